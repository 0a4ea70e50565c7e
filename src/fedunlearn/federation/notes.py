"""What a line of history says beside its clients' outcomes: notes and mean losses; and what a run that unlearned nothing ends with."""

import logging
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

from fedunlearn.aggregation.choices import reducer_of
from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.aggregation.gate import above_cap
from fedunlearn.config.run import TrainRun
from fedunlearn.errors import UserError
from fedunlearn.federation.planning import NOBODY
from fedunlearn.federation.server_step import Stepped
from fedunlearn.records.rounds import ClientOutcome, ClientRows, Role

log = logging.getLogger(__name__)


def step_notes(run: TrainRun, round: int, stepped: Stepped) -> tuple[str, ...]:
    """What the weights of a round are to be known by; each note is logged too."""
    notes = (*_trim_notes(run, stepped), *_cap_notes(run, stepped))
    for note in notes:
        log.warning("round %d: %s", round, note)
    return notes


def _trim_notes(run: TrainRun, stepped: Stepped) -> tuple[str, ...]:
    """A trimmed mean of so few updates that nobody is left out is a plain mean."""
    chosen, count = run.aggregation, len(stepped.weights)
    left_out = reducer_of(chosen.reducer, chosen.trim).num_left_out(count)
    if left_out != 0 or not count:
        return ()
    return (f"aggregation.trim={chosen.trim} leaves out nobody of {count} updates: the mean is a plain one",)


def _cap_notes(run: TrainRun, stepped: Stepped) -> tuple[str, ...]:
    """Whom the cap held down; and who counts for more all the same, for the cap acts before robust weights, which may choose one client alone."""
    notes = []
    cap = f"gate.max_client_share={run.gate.max_client_share}"
    if stepped.capped:
        notes.append(f"{cap} holds down clients {', '.join(map(str, sorted(stepped.capped)))}")
    if above := above_cap(stepped.weights, run.gate.max_client_share):
        told = ", ".join(f"{client} ({stepped.weights[client]:.2g})" for client in above)
        notes.append(
            f"{cap} is passed by clients {told}: it acts before robust {type(run.robust).__name__}, which weighs them anew"
        )
    return tuple(notes)


def mean_losses(clients: tuple[ClientOutcome, ...]) -> dict[str, float]:
    """The weighted mean loss of each role that trained."""
    metrics = {}
    for role in (Role.FINETUNE, Role.UNLEARN):
        parts = [
            (o.weight, o.loss)
            for o in clients
            if o.role is role and o.loss is not None and o.weight > 0 and math.isfinite(o.loss)
        ]
        if parts:
            metrics[f"loss/{role.value}"] = sum(w * loss for w, loss in parts) / sum(w for w, _ in parts)
    return metrics


def check_unlearned(run: TrainRun, rows: Sequence[ClientRows], lines: Sequence[Mapping[str, object]]) -> None:
    """Raises UserError where no owner's update counted in any round, or none made a step: the result would be no unlearning at all.

    Owners whose updates counted in no round, though others' did, are told: their rows are in the model as before. rows: what each client owns; lines: the history.
    """
    clients = [client for line in lines for client in line["clients"]]  # type: ignore[attr-defined]
    owners = [client for client in clients if client["role"] == Role.UNLEARN]
    if not any(client["weight"] > 0 for client in owners):
        raise UserError(_without_weight(run) if owners else _never_asked(run))
    if not any(client["num_steps"] for client in owners):
        raise UserError(
            f"nobody unlearned: trainer.guard stopped every owner before its first step ({owners[0]['stopped']}). Raise trainer.guard.max_loss or "
            "max_update_ratio, lower the learning rate or the method's own values, and start anew with overwrite=true"
        )
    if not run.protocol.releases:
        _tell_unserved({row.client_id for row in rows if row.num_forget}, owners)


def _tell_unserved(owning: Set[int], asked: Sequence[Mapping[str, Any]]) -> None:
    unserved = owning - {client["client_id"] for client in asked if client["weight"] > 0}
    if unserved:
        log.warning(
            "clients %s own forget rows and counted in no round: nothing of theirs was unlearned. History says why where they were drawn; "
            "else raise trainer.federated.num_rounds or fraction_train, or set force_owners=true",
            sorted(unserved),
        )


def _never_asked(run: TrainRun) -> str:
    """No owner worked, though the plan draws some: a Flower strategy says whom of the cohort it wants."""
    if not isinstance(run.strategy, FlowerStrategy):
        return NOBODY
    return (
        f"nobody unlearned: owners of forget rows were drawn, but strategy {run.strategy.target} left them out of every round. "
        "Choose another strategy, or raise trainer.federated.num_rounds, and start anew with overwrite=true"
    )


def _without_weight(run: TrainRun) -> str:
    """Owners worked and their updates passed, but what weighs the clients gave them nothing in every round."""
    reweighs = run.robust.reads_gram
    by = f"robust {type(run.robust).__name__}" if reweighs else f"aggregation.weights={run.aggregation.weights}"
    return (
        f"nobody unlearned: owners of forget rows were drawn and gave usable updates, but {by} gave none of them any weight in any round. "
        f"Choose {'robust=off or one that keeps more updates' if reweighs else 'aggregation.weights=owned'}, or raise trainer.federated.num_rounds, "
        "and start anew with overwrite=true"
    )
