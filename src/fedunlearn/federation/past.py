"""The fine-tuning run that an adapter comes from, as far as server-side methods read it."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedunlearn.aggregation.base import ServerState
from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.errors import UserError
from fedunlearn.federation.checkpoint import Checkpoint, read_checkpoint, read_history, round_folder
from fedunlearn.federation.ledger import Ledger
from fedunlearn.federation.start import load_start
from fedunlearn.files import read_object, write_json
from fedunlearn.models.source import adapter_folder, run_of
from fedunlearn.records.ledger import LedgerEntry
from fedunlearn.reporting.run_folder import DONE
from fedunlearn.server_methods.base import ServerMethod

LEDGER_HEAD = "ledger_head"


@dataclass(frozen=True, eq=False)
class Past:
    """A finished fine-tuning run. folder: its own."""

    folder: Path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Its composed config."""
        return _json(self.folder / "config.json")

    @cached_property
    def run(self) -> TrainRun:
        """The record of it. Raises UserError where its config is of another version."""
        found = parse_config(self.config)
        if not isinstance(found, TrainRun):
            raise ValueError(f"{self.folder} is no training run")
        return found

    @property
    def num_rounds(self) -> int:
        """How many rounds it had."""
        return self.run.trainer.federated.num_rounds

    @property
    def strategy(self) -> str:
        """The class that made its states."""
        return str(self.config["strategy"]["_target_"])

    @cached_property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """Its ledger's lines. Raises UserError where there is none, its chain is broken, or it is not the one the run ended with."""
        ledger = Ledger(self.folder)
        found = ledger.entries()
        ended_with = _json(self.folder / DONE).get(LEDGER_HEAD)
        if not found or found[-1].hash != ended_with:
            raise UserError(
                f"the ledger in {str(self.folder)!r} is not the one that this run ended with (it was cut, or is another run's): make the run anew with ledger.enabled=true"
            )
        return found

    def updates(self, round: int) -> Mapping[int, LedgerEntry]:
        """Gives the entries of clients that counted in a round, by client."""
        return {e.client_id: e for e in self.entries if e.kind == "update" and e.round == round and e.weight > 0}

    def first_contribution(self, clients: Collection[int]) -> int | None:
        """Gives the first round in which one of the clients counted; None where none ever did."""
        for line in read_history(self.folder):
            counted: list[Any] = line["clients"]  # type: ignore[assignment]
            if any(client["client_id"] in clients and client["weight"] > 0 for client in counted):
                return int(str(line["round"]))
        return None

    def check_kept(self, round: int) -> None:
        """Raises UserError where the checkpoint that a round began with was pruned."""
        if round > 1 and not round_folder(self.folder, round - 1).is_dir():
            raise UserError(
                f"round {round - 1} of {str(self.folder)!r} is wanted and was pruned: make that run anew with trainer.federated.keep_rounds=all"
            )

    def before(self, round: int) -> Checkpoint:
        """Gives the state that a round began with. Raises UserError where its checkpoint was pruned or is damaged."""
        self.check_kept(round)
        return self.beginning() if round == 1 else read_checkpoint(round_folder(self.folder, round - 1))

    def round_of(self, method: ServerMethod, targets: Collection[int]) -> int:
        """Gives the round whose beginning a method goes back to. Raises UserError where targets to go back behind never counted."""
        if method.beginning == "origin":
            return 1
        if method.beginning == "others":
            return self.num_rounds
        if method.beginning == "rewind":
            return max(self.num_rounds - method.rewind_rounds + 1, 1)
        number = self.first_contribution(targets)
        if number is None:
            raise UserError(
                f"method {type(method).__name__}: clients {sorted(targets)} never counted in {str(self.folder)!r}, there is nothing to go back behind"
            )
        return number

    def beginning(self) -> Checkpoint:
        """Gives the state before round 1."""
        start = load_start(self.folder)
        state = ServerState(adapter=start.adapter.tensors)
        return Checkpoint(state=state, strategy=self.strategy, blocks=start.blocks)


def ancestry(source: Path | None) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yields a run of ours and all that it goes on from, the newest first, each with its composed config."""
    folder, seen = source, set[Path]()
    while folder is not None and folder not in seen:
        seen.add(folder)
        config = _json(folder / "config.json")
        yield folder, config
        args = config["model"]["model_args"]
        named = Path(args["lora_model_path"] or args["pretrained_model_name_or_path"])
        folder = run_of(adapter_folder(named, "its model")) if named.exists() else None


def find_past(source: Path | None, named: str) -> Past:
    """Gives the fine-tuning run behind a run of ours: itself, or what it went on from, however many requests lie between.

    Raises UserError where there is none, naming the method that wants it.
    """
    for folder, config in ancestry(source):
        if config.get("mode") == "train":
            return Past(folder)
    raise UserError(
        f"method {named} works on what the server remembers of fine-tuning, but the adapter comes from no run of ours: "
        "name a run's folder as model.model_args.pretrained_model_name_or_path, or choose a local method"
    )


PAST = "past.json"


def write_past(folder: Path, parent: Path | None, past: Past | None) -> None:
    """Writes past.json into a run's folder: the run its adapter comes from, and the fine-tuning behind it where the method reads that."""
    write_json(
        folder / PAST,
        {
            "parent": None if parent is None else str(parent.resolve()),
            "past": None if past is None else str(past.folder.resolve()),
        },
    )


def read_past(folder: Path) -> Past | None:
    """Gives the fine-tuning run that the method reads; None where it reads none."""
    named = _json(folder / PAST)["past"]
    return None if named is None else Past(Path(str(named)))


def read_parent(folder: Path) -> Path | None:
    """Gives the run that the adapter comes from; None where it comes from none."""
    named = _json(folder / PAST)["parent"]
    return None if named is None else Path(str(named))


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} is missing or damaged ({error}): the run it belongs to must be whole; make it anew"
        ) from error
