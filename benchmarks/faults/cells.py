"""One cell: a whole run of the round loop with one client gone wrong, and everything it must have left as if that client had not been there."""

import gc
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from flwr.app import Error
from flwr.serverapp import Grid

from fedunlearn.config.run import TrainRun
from fedunlearn.federation.block_store import BlockStore
from fedunlearn.federation.checkpoint import HISTORY, Checkpoint, latest_checkpoint
from fedunlearn.federation.faults import CLIENT_TIMEOUT
from fedunlearn.federation.rounds import ROLL_CALL, run_rounds
from fedunlearn.records.adapter import hash_tensors

from .catalogue import FAULTS, ROLL_CALL_FAULTS, Fault, RollCallFault, twin_of
from .expected import Direct
from .recording import NUM_CLIENTS, NUM_ROUNDS, Recorded, run_for
from .replay import SILENT, Answer, Honest, ReplayGrid, Work, fast_clock
from .rows import Row

ALL = tuple(range(NUM_CLIENTS))
LONGEST_LINE = 400
CANDIDATES = (2, 0, 1, 3, 4, 5)


def all_but(*out: int) -> tuple[int, ...]:
    """The other clients."""
    return tuple(client for client in ALL if client not in out)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """found: `ok`, else what is wrong. codes: the reasons in the history, by round."""

    row: str
    group: str
    fault: str
    found: str
    codes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the cell holds."""
        return self.found == "ok"


@dataclass(frozen=True, eq=False, kw_only=True)
class Played:
    """What a run left. error: what it ended with, empty where it ended well. state: a hash of all that the server keeps for later rounds."""

    error: str
    lines: tuple[dict, ...] = ()
    state: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    members: tuple[int, ...] = ()

    @property
    def hashes(self) -> tuple[str, ...]:
        """The adapter's hash after each round."""
        return tuple(line["adapter_hash"] for line in self.lines)

    @property
    def details(self) -> tuple[str, ...]:
        """What the history says beside its reasons."""
        return tuple(client["detail"] for line in self.lines for client in line["clients"])

    def codes(self, client: int) -> tuple[str, ...]:
        """The reasons that the history has for a client."""
        return tuple(c["reason"] for line in self.lines for c in line["clients"] if c["client_id"] == client)


class Bench:
    """One row's runs, each from the record to its last round. place: a folder of its own."""

    def __init__(self, recorded: Recorded, place: Path, row: Row) -> None:
        self.recorded, self.place, self.row = recorded, place, row
        self.run: TrainRun = run_for(place, *row.overrides)
        self.direct = Direct(recorded, row, self.run, BlockStore(place / "blocks"))
        self._silent: dict[tuple[int, ...], Played] = {}

    def play(
        self,
        works: Mapping[int, Callable[[Work], Answer]] | None = None,
        declares: Mapping[int, Callable[..., Answer]] | None = None,
    ) -> Played:
        """Runs all rounds with these clients gone wrong."""
        with fast_clock():
            return self.play_on(ReplayGrid(Honest(self.recorded, self.direct.shapes), works, declares))

    def play_on(self, grid: Grid, run: TrainRun | None = None) -> Played:
        """Runs all rounds over a grid."""
        return played_on(grid, run or self.run, self.recorded, self.place / "cell")

    @cached_property
    def faulty(self) -> int:
        """Who goes wrong: client 2, or where its update counts for nothing anyway (Krum) the first whose does."""
        whole = self.direct.hashes(ALL)
        return next((k for k in CANDIDATES if self.direct.hashes(all_but(k)) != whole), CANDIDATES[0])

    @cached_property
    def without(self) -> Played:
        """The reference: the same run, in which only that client's replies are missing."""
        return self.play(works={self.faulty: lambda work: Error(CLIENT_TIMEOUT, "missing")})

    @cached_property
    def honest(self) -> Played:
        """The run in which nothing goes wrong."""
        return self.play()

    def silent(self, out: tuple[int, ...]) -> Played:
        """The run in which some nodes never answer the roll call."""
        if out not in self._silent:
            self._silent[out] = self.play(declares={client: lambda said: Error(SILENT, "") for client in out})
        return self._silent[out]


def played_on(grid: Grid, run: TrainRun, recorded: Recorded, folder: Path) -> Played:
    """Runs all rounds from the record's start, in a folder of their own."""
    shutil.rmtree(folder, ignore_errors=True)
    recorded.begin(folder)
    try:
        run_rounds(grid, run, folder, False)
    except Exception as error:  # whatever ends a run is what a cell tells
        return Played(error=f"{type(error).__name__}: {error}")
    return read_played(folder)


def read_played(folder: Path) -> Played:
    """What a run that came to its last round left."""
    text = (folder / HISTORY).read_text(encoding="utf-8")
    try:
        lines = tuple(json.loads(line, parse_constant=_refuse) for line in text.splitlines())
    except ValueError as error:
        return Played(error=f"history.jsonl is no strict JSON: {error}")
    called = json.loads((folder / ROLL_CALL).read_text(encoding="utf-8"))
    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    if not all(bool(torch.isfinite(t).all()) for t in checkpoint.state.adapter.values()):
        return Played(error="the global adapter is not finite")
    if lines[-1]["adapter_hash"] != checkpoint.adapter_hash:
        return Played(error="history.jsonl and the checkpoint name different adapters")
    return Played(
        error="",
        lines=lines,
        state=_state(checkpoint),
        refused=tuple(called["refused"]),
        members=tuple(sorted(map(int, called["members"]))),
    )


def _refuse(constant: str) -> float:
    raise ValueError(f"it holds {constant}")


def _state(checkpoint: Checkpoint) -> tuple[str, ...]:
    moments = [hash_tensors(tensors) for _, tensors in sorted(checkpoint.state.moments.items())]
    foreign = hash_tensors(checkpoint.foreign.arrays) if checkpoint.foreign else ""
    return (checkpoint.adapter_hash, hash_tensors(checkpoint.carried), foreign, *moments)


def cells_of(bench: Bench, faults: tuple[Fault, ...], called: tuple[RollCallFault, ...]) -> Iterator[Cell]:
    """Judges one row: first its two references against the direct computation, then every fault."""
    yield _cell(bench, "none", lambda: _judge_reference(bench, bench.honest, ALL))
    yield _cell(bench, "one missing", lambda: _judge_reference(bench, bench.without, all_but(bench.faulty)))
    for fault in faults:
        yield _cell(bench, fault.name, lambda fault=fault: _judge(bench, fault))
    for refused in called:
        yield _cell(bench, refused.name, lambda refused=refused: _judge_called(bench, refused))


def _cell(bench: Bench, name: str, judge: Callable[[], tuple[str, Played]]) -> Cell:
    began = time.monotonic()
    try:
        found, played = judge()
    except Exception as error:  # the direct computation fails, or is not what dense float64 says
        found, played = f"reference: {type(error).__name__}: {error}", Played(error="")
    return Cell(
        row=bench.row.name,
        group=bench.row.group,
        fault=name,
        found=found,
        codes=played.codes(bench.faulty) if played.lines else (),
        seconds=round(time.monotonic() - began, 3),
    )


def _judge_reference(bench: Bench, played: Played, clients: tuple[int, ...]) -> tuple[str, Played]:
    """A reference holds where it is what the direct computation gives, and where the client's update makes a difference at all."""
    if played.error:
        return played.error, played
    if played.hashes != bench.direct.hashes(clients):
        return "another adapter than the direct computation gives", played
    seen = bench.honest.hashes != bench.without.hashes
    return "ok" if seen else "the client's update makes no difference", played


def _judge(bench: Bench, fault: Fault) -> tuple[str, Played]:
    fault = as_seen_by(bench.row, fault)
    played = bench.play(works={bench.faulty: fault.act})
    if played.error:
        return f"ended the run: {played.error}", played
    if played.codes(bench.faulty) != (fault.code,) * NUM_ROUNDS:
        return f"codes {played.codes(bench.faulty)} instead of {fault.code!r}", played
    return first_fault(played, _wanted(bench, fault), (bench.faulty,) if fault.code else ()), played


def as_seen_by(row: Row, fault: Fault) -> Fault:
    """Where the strategy weighs by the loss, it is a part of the update, and has to be one that can be right."""
    if not row.reads_loss or not fault.name.startswith("loss"):
        return fault
    return replace(fault, code="nan" if fault.name == "loss NaN" else "loss", counts="not")


def _wanted(bench: Bench, fault: Fault) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The adapters' hashes that must come out, and the whole state where there is a run to compare with."""
    if fault.counts == "zero":
        return bench.direct.hashes(ALL, idle=bench.faulty), ()
    twin = bench.honest if fault.counts == "honest" else bench.without
    return twin.hashes, twin.state


def first_fault(played: Played, wanted: tuple[tuple[str, ...], tuple[str, ...]], out: tuple[int, ...]) -> str:
    """What a run that ended well has other than it should: `ok` where nothing. wanted: adapters' hashes by round, and the state; out: whose update must not count."""
    hashes, state = wanted
    if played.hashes != hashes:
        return f"another adapter in round {_first_apart(played.hashes, hashes)}"
    if state and played.state != state:
        return "the same adapters, but another state for later rounds"
    if not all(text.isprintable() and len(text) <= LONGEST_LINE for text in (*played.details, *played.refused)):
        return "what the client wrote reaches the log as it is"
    for line in played.lines:
        for client in line["clients"]:
            left_out = client["client_id"] in out
            if bool(client["reason"]) != left_out or (left_out and client["weight"] != 0):
                return f"round {line['round']}: client {client['client_id']} {client['reason']!r}, weight {client['weight']}"
        if (
            not 0 < sum(client["weight"] for client in line["clients"]) < 1 + 1e-9
        ):  # clipping leaves some for the old adapter
            return f"round {line['round']}: weights sum to more than 1"
    return "ok"


def _first_apart(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    return next((k for k, pair in enumerate(zip(one, other, strict=False), 1) if pair[0] != pair[1]), len(one) + 1)


def _judge_called(bench: Bench, fault: RollCallFault) -> tuple[str, Played]:
    played = bench.play(declares={bench.faulty: fault.act})
    if played.error:
        return f"ended the run: {played.error}", played
    out = (bench.faulty, twin_of(bench.faulty)) if fault.costs_another else (bench.faulty,)
    if played.members != all_but(*out):
        return f"members {played.members} instead of {all_but(*out)}", played
    if not any(fault.said in refusal for refusal in played.refused):
        return f"no refusal says {fault.said!r}: {played.refused}", played
    twin = bench.silent(out)
    if twin.error:
        return f"the silent node ended its run: {twin.error}", played
    return first_fault(played, (twin.hashes, twin.state), ()), played


def as_json(cell: Cell) -> dict[str, object]:
    """A cell as JSON holds it."""
    return {**asdict(cell), "ok": cell.ok}


def cells_of_row(folder: Path, row: Row) -> list[Cell]:
    """Judges one row from start to end, in whatever process this is. folder: the record's."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    gc.freeze()  # some of Flower's strategies collect garbage once a reply
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        bench = Bench(Recorded.load(folder), Path(place), row)
        return list(cells_of(bench, FAULTS, ROLL_CALL_FAULTS))
