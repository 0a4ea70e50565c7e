"""Roles too small for a median: two owners that unlearn and two others, as on the pocket, and one of the four gone wrong."""

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

from fedunlearn.config.run import TrainRun
from fedunlearn.data.ownership import FILE
from fedunlearn.data.requests import FILE as REQUEST
from fedunlearn.federation.faults import CLIENT_TIMEOUT
from fedunlearn.federation.site import client_shapes
from fedunlearn.federation.start import BEGAN, START
from fedunlearn.federation.wire import RollCallReply
from fedunlearn.records.rounds import Role
from fedunlearn.records.shape import ClientShape

from .catalogue import SMALL_ROLE_FAULTS, Fault
from .cells import Cell, Played, first_fault, played_on, read_played
from .recording import NUM_ROUNDS, Recorded, run_for
from .replay import Answer, Honest, ReplayGrid, Work, fast_clock
from .rows import RANKS, Row

SMALL_ROLES = "small roles"
NUM_SMALL = 4
OWNERS = (2, 3)
FAULTY: Mapping[str, int] = {"an owner": 2, "another": 0}
NONE_CHOSEN = "gave none of them any weight in any round"
INSTEAD: Mapping[str, tuple[str, ...]] = {
    "krum": ("robust.num_malicious=0",),
    "multi_krum": ("robust.num_malicious=0",),
    "trimmed_mean": ("aggregation.trim=0.34",),  # one at each end, of four and of three
}
"""What four clients, or the three that are left, are enough for."""


def recorded_for(recorded: Recorded, place: Path, owners: tuple[int, ...], count: int) -> Recorded:
    """The same record with `count` clients, of which `owners` own forget rows. place: what a run's folder then begins as."""
    declared = {k: _owning(recorded.declared[k], k in owners) for k in range(count)}
    shutil.copytree(recorded.folder / START, place / START)
    for name in (FILE, REQUEST):
        shutil.copy(recorded.folder / name, place / name)
    rows = [asdict(declared[k].rows) for k in range(count)]
    (place / BEGAN).write_text(json.dumps({"run_id": "small", "sidecar": [], "rows": rows}), encoding="utf-8")
    return replace(recorded, folder=place, declared=declared)


def _owning(said: RollCallReply, owns: bool) -> RollCallReply:
    forget = said.num_owned // 2 if owns else 0
    return replace(said, num_forget=forget, num_retain=said.num_owned - forget)


@dataclass(frozen=True, eq=False)
class SmallBench:
    """One row with four clients. A strategy that reads losses is refused where clients unlearn: its role of two is one that fine-tunes."""

    recorded: Recorded
    place: Path
    row: Row
    more: tuple[str, ...] = ()

    @property
    def unlearns(self) -> bool:
        """Whether there are owners."""
        return not self.row.reads_loss

    @property
    def count(self) -> int:
        """How many clients there are."""
        return NUM_SMALL if self.unlearns else 2

    @cached_property
    def small(self) -> Recorded:
        """The record of these clients."""
        self.place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.place))
        return recorded_for(self.recorded, folder, OWNERS if self.unlearns else (), self.count)

    @cached_property
    def run(self) -> TrainRun:
        """The row's run."""
        ranks = f"partition.ranks=[{','.join(['4', '2', '2', '1'][: self.count])}]"
        own = tuple(ranks if override == RANKS else override for override in self.row.overrides)
        number = f"trainer.federated.num_clients={self.count}"
        overrides = (*own, *INSTEAD.get(self.row.name, ()), number, *self.more)
        return run_for(self.place, *overrides, unlearns=self.unlearns)

    @cached_property
    def shapes(self) -> dict[int, ClientShape]:
        """Clients' own ranks."""
        return (
            dict(enumerate(client_shapes(self.run, self.recorded.start.peft_config))) if self.run.ranks_differ else {}
        )

    def play(self, works: Mapping[int, Callable[[Work], Answer]]) -> Played:
        """Runs all rounds with these clients gone wrong. Krum may choose no owner in any of them: that is told at the end, with all rounds on disk."""
        grid, folder = ReplayGrid(Honest(self.small, self.shapes), works), self.place / "cell"
        with fast_clock():
            played = played_on(grid, self.run, self.small, folder)
        return read_played(folder) if NONE_CHOSEN in played.error else played

    def without(self, client: int) -> Played:
        """The reference: the same run, in which only that client's replies are missing."""
        if client not in self._without:
            self._without[client] = self.play({client: lambda work: Error(CLIENT_TIMEOUT, "missing")})
        return self._without[client]

    @cached_property
    def _without(self) -> dict[int, Played]:
        return {}


def small_cells_of(bench: SmallBench, faults: tuple[Fault, ...] = SMALL_ROLE_FAULTS) -> Iterator[Cell]:
    """Judges one row: every fault of an owner, and of another."""
    for who, client in FAULTY.items() if bench.unlearns else (("another", 0),):
        for fault in faults:
            began = time.monotonic()
            found, played = _judge(bench, client, fault)
            yield Cell(
                row=bench.row.name,
                group=SMALL_ROLES,
                fault=f"{who}: {fault.name}",
                found=found,
                codes=played.codes(client),
                seconds=round(time.monotonic() - began, 3),
            )


def _judge(bench: SmallBench, client: int, fault: Fault) -> tuple[str, Played]:
    twin, played = bench.without(client), bench.play({client: fault.act})
    if twin.error or played.error:
        return f"ended the run: {twin.error or played.error}", played
    if played.codes(client) != (fault.code,) * NUM_ROUNDS:
        return f"codes {played.codes(client)} instead of {fault.code!r}", played
    roles = [sorted(c["role"] for c in line["clients"]) for line in played.lines]
    wanted = [Role.FINETUNE] * 2 + [Role.UNLEARN] * 2 if bench.unlearns else [Role.FINETUNE] * 2
    if roles != [wanted] * NUM_ROUNDS:
        return f"roles {roles}", played
    return first_fault(played, (twin.hashes, twin.state), (client,)), played


def small_cells_of_row(folder: Path, row: Row) -> list[Cell]:
    """Judges one row from start to end, in whatever process this is. folder: the record's."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    gc.freeze()  # some of Flower's strategies collect garbage once a reply
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        return list(small_cells_of(SmallBench(Recorded.load(folder), Path(place), row)))
