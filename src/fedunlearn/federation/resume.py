"""Where a run's rounds begin: at its start, or where its newest checkpoint says it stood; history and ledger are brought back to that."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedunlearn.aggregation.base import ServerState
from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.config.run import TrainRun
from fedunlearn.data.requests import own_request
from fedunlearn.errors import UserError
from fedunlearn.federation.checkpoint import (
    HISTORY,
    Checkpoint,
    Standing,
    cut_history,
    damaged,
    latest_checkpoint,
    read_history,
    round_folder,
)
from fedunlearn.federation.conductor import Conductor
from fedunlearn.federation.ledger import Ledger
from fedunlearn.federation.past import read_parent
from fedunlearn.federation.server_step import Stepper
from fedunlearn.federation.start import Start


def first_checkpoint(
    run: TrainRun, folder: Path, start: Start, stepper: Stepper, conductor: Conductor | None
) -> Checkpoint:
    """Gives the newest on disk where the run is resumed, else the start; history.jsonl and the ledger then end where it does.

    Raises UserError, with nothing changed, for a checkpoint that is damaged, of another run, request or strategy, and for a history or ledger
    that does not lead up to it.
    """
    found = latest_checkpoint(folder) if run.resume else None
    if found is None:
        state = ServerState(adapter=start.adapter.tensors)
        present = Checkpoint(state=state, strategy=stepper.strategy_name, blocks=start.blocks)
        present = present if conductor is None else conductor.begin(present)
        cut_history(folder, present.state.round)
        _begin_ledger(run, folder)
        return present
    _check_strategy(stepper, found)
    standing = _checked_standing(run, folder, start, found)
    _check_moments(run, folder, found)
    if run.ledger.enabled:
        _cut_ledger(folder, found, standing)
    cut_history(folder, found.state.round)
    if stepper.foreign is not None and found.foreign is not None:
        stepper.foreign.restore(found.foreign)
    return found


def _begin_ledger(run: TrainRun, folder: Path) -> None:
    if run.ledger.enabled:
        past = read_parent(folder)
        Ledger(folder).begin(None if past is None else Ledger(past))


def _check_strategy(stepper: Stepper, found: Checkpoint) -> None:
    if found.strategy != stepper.strategy_name:
        raise UserError(
            f"round {found.state.round} on disk holds the state of strategy {found.strategy}, this run has {stepper.strategy_name}: "
            "go on with the strategy it was begun with, or start anew with overwrite=true"
        )


def _checked_standing(run: TrainRun, folder: Path, start: Start, found: Checkpoint) -> Standing:
    """Gives where the run stood. Raises UserError where the checkpoint is another run's or request's, or the history is not what led up to it."""
    place, standing = round_folder(folder, found.state.round), found.standing
    if standing is None:
        raise damaged(place, "it does not say where the run stood")
    for what, its, mine in (
        ("run", standing.run_id, start.run_id),
        ("request", standing.request, own_request(folder).hash),
    ):
        if its != mine:
            raise UserError(
                f"checkpoint {str(place)!r} is of another {what} ({its}; this one is {mine}), and with another config: delete that folder, resume=true then "
                "goes on from the round before"
            )
    if not _leads_up(folder / HISTORY, standing.history, found.state.round):
        raise UserError(
            f"{str(folder / HISTORY)!r} is not what round {found.state.round} left: it was changed or cut after it was written; put it back, or start anew "
            "with overwrite=true"
        )
    return standing


def _leads_up(path: Path, before: int, number: int) -> bool:
    """Whether a history holds whole lines in its first bytes, and after them that round's."""
    text = path.read_bytes() if path.is_file() else b""
    lines = [_number_of(line) for line in read_history(path.parent)]
    place = text[:before].count(b"\n")
    whole = len(text) > before and (before == 0 or text[before - 1 : before] == b"\n")
    return whole and lines[place : place + 1] == [number]


def _number_of(line: Mapping[str, Any]) -> int:
    return int(str(line["round"]))


def _cut_ledger(folder: Path, found: Checkpoint, standing: Standing) -> None:
    ledger = Ledger(folder)
    if ledger.head_of(found.state.round) != standing.ledger:
        raise UserError(
            f"the ledger in {str(folder)!r} is not the one that round {found.state.round} left: it was changed or cut after it was written; put it back, or "
            "start anew with overwrite=true"
        )
    ledger.cut(found.state.round)


def _check_moments(run: TrainRun, folder: Path, found: Checkpoint) -> None:
    """Raises UserError where the strategy keeps moments, has stepped, and the checkpoint holds others or none."""
    wanted = [] if isinstance(run.strategy, FlowerStrategy) else sorted(run.strategy.moment_names)
    done = [line for line in read_history(folder) if _number_of(line) <= found.state.round]
    stepped = any(client["weight"] != 0 for line in done for client in line["clients"])  # type: ignore[attr-defined]
    if sorted(found.state.moments) != (wanted if stepped else []):
        held = sorted(found.state.moments)
        why = f"it holds the moments {held}, {type(run.strategy).__name__} keeps {wanted}"
        raise damaged(round_folder(folder, found.state.round), why)
