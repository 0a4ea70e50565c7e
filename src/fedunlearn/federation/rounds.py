"""The round loop: roll call once, then plan, train, gate, mean, step, checkpoint and one line of history, round by round."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flwr.serverapp import Grid

import fedunlearn
from fedunlearn.aggregation.base import ServerState
from fedunlearn.aggregation.mean import client_weights, weighted_mean
from fedunlearn.config.run import TrainRun
from fedunlearn.data.ownership import FILE, read_partition
from fedunlearn.errors import UserError
from fedunlearn.federation.checkpoint import (
    Checkpoint,
    append_history,
    cut_history,
    latest_checkpoint,
    read_history,
    save_checkpoint,
)
from fedunlearn.federation.link import Expectation, Member, roll_call
from fedunlearn.federation.spool import Spool, open_spool
from fedunlearn.federation.turn import Turn, TurnReport, take_turn
from fedunlearn.files import write_json
from fedunlearn.models.adapter_files import load_adapter
from fedunlearn.protocols.selection import select
from fedunlearn.records.adapter import Adapter, hash_tensors
from fedunlearn.records.rounds import ClientOutcome, ClientTask, Role, RoundPlan, RoundResult
from fedunlearn.reporting.curves import Curves, open_curves
from fedunlearn.reporting.progress import track
from fedunlearn.seeds import seed_of

log = logging.getLogger(__name__)
START, ROLL_CALL = "start", "roll_call.json"
NOBODY = (
    "nobody unlearned: no owner of forget rows is drawn in any round. Raise trainer.federated.fraction_train or num_rounds, "
    "and start anew with overwrite=true"
)


@dataclass(frozen=True, eq=False)
class Server:
    """What the loop knows from start to end. start: the adapter the run began with, for unlearning the reference."""

    grid: Grid
    run: TrainRun
    folder: Path
    run_id: str
    start: Adapter
    members: Mapping[int, Member]
    needs_reference: bool


def run_rounds(grid: Grid, run: TrainRun, folder: Path, run_id: str, needs_reference: bool) -> None:
    """Runs the rounds that are left and leaves each one's checkpoint in `folder`.

    The start adapter and partition.json lie there. Raises UserError where the roll call fails or a round cannot be completed;
    everything up to the last good round is then on disk.
    """
    start, _ = load_adapter(folder / START)
    checkpoint = (latest_checkpoint(folder) if run.resume else None) or Checkpoint(
        state=ServerState(adapter=start.tensors)
    )
    cut_history(folder, checkpoint.state.round)
    federated = run.trainer.federated
    partition = read_partition(folder / FILE)
    expected = Expectation(
        num_owned=tuple(len(rows) for rows in partition.clients),
        version=fedunlearn.__version__,
        base_fingerprint=str(start.base_fingerprint),
        partition_hash=partition.hash,
    )
    members = roll_call(grid, expected, federated.roll_call_timeout)
    answers = {
        str(client): {**asdict(member.declared), "bytes_up": member.bytes_up} for client, member in members.items()
    }
    write_json(folder / ROLL_CALL, answers)
    server = Server(grid, run, folder, run_id, start, members, needs_reference)
    if run.mode == "unlearn":
        _check_an_owner_is_drawn(run, members)
    rounds = range(checkpoint.state.round + 1, federated.num_rounds + 1)
    with open_curves(folder, run.trainer.args.report_to) as curves:
        for number in track(rounds, f"{run.task_name}: round", len(rounds)):
            checkpoint = _one_round(server, checkpoint, number, curves)
    if run.mode == "unlearn":
        _check_unlearned(folder)


def _check_an_owner_is_drawn(run: TrainRun, members: Mapping[int, Member]) -> None:
    """Raises UserError, before any training, where no round of the whole plan lets an owner unlearn: plans are functions of the seed."""
    plans = (plan_round(run, members, number) for number in range(1, run.trainer.federated.num_rounds + 1))
    if not any(task.role is Role.UNLEARN for plan in plans for task in plan.tasks):
        raise UserError(NOBODY)


def _check_unlearned(folder: Path) -> None:
    """Raises UserError where no owner's update counted in any round: the result would be no unlearning at all."""
    clients = [client for line in read_history(folder) for client in line["clients"]]  # type: ignore[attr-defined]
    if not any(client["role"] == Role.UNLEARN and client["weight"] > 0 for client in clients):
        raise UserError(NOBODY)


def plan_round(run: TrainRun, members: Mapping[int, Member], number: int) -> RoundPlan:
    """Draws the cohort, asks the protocol for roles, and gives every client its seed and learning rate."""
    args, federated = run.trainer.args, run.trainer.federated
    cohort = select(
        list(members), seed=args.seed, round=number, fraction=federated.fraction_train, at_least=federated.min_clients
    )
    rows = [members[client].declared.rows for client in cohort]
    progress = (number - 1) / max(federated.num_rounds - 1, 1)
    scale = 1.0 + (federated.final_lr_ratio - 1.0) * progress
    return RoundPlan(
        round=number,
        tasks=tuple(
            ClientTask(
                client_id=part.client_id,
                role=part.role,
                epochs=part.epochs,
                lr_scale=scale,
                seed=seed_of("client", args.seed, part.client_id, number),
            )
            for part in run.protocol.assign(number, rows, args.num_train_epochs)
        ),
    )


def _one_round(server: Server, checkpoint: Checkpoint, number: int, curves: Curves) -> Checkpoint:
    began = time.monotonic()
    plan = plan_round(server.run, server.members, number)
    with open_spool(server.folder) as spool:
        report, attempts = _collect(server, checkpoint, plan, spool)
        weights = client_weights(report.updates, server.run.aggregation.weights) if report.updates else {}
        state = _step(server, checkpoint.state, weights, spool)
    clients = tuple(replace(outcome, weight=weights.get(outcome.client_id, 0.0)) for outcome in report.outcomes)
    result = RoundResult(
        round=number,
        attempt=attempts,
        adapter_hash=hash_tensors(state.adapter),
        seconds=time.monotonic() - began,
        clients=clients,
        metrics=_metrics(clients),
    )
    append_history(server.folder, asdict(result))  # before the checkpoint: resume drops lines that have none
    after = Checkpoint(state=state, holders=report.holders)
    save_checkpoint(server.folder, after, server.start, server.run.trainer.federated.keep_rounds)
    curves.add(result)
    return after


def _step(server: Server, state: ServerState, weights: Mapping[int, float], spool: Spool) -> ServerState:
    if not weights:
        log.warning(
            "round %d: no client of the cohort had anything to do; the global adapter stays as it is", state.round + 1
        )
        return replace(state, round=state.round + 1)
    with spool.reader(weights) as read:
        return server.run.strategy.step(state, weighted_mean(list(state.adapter), weights, read))


def _collect(server: Server, checkpoint: Checkpoint, plan: RoundPlan, spool: Spool) -> tuple[TurnReport, int]:
    """Asks the cohort, then the dropped ones again, until enough updates count; gives them and the number of attempts."""
    federated = server.run.trainer.federated
    working = [task for task in plan.tasks if task.role is not Role.IDLE]
    wanted = min(federated.min_clients, len(working))
    idle = tuple(
        ClientOutcome(client_id=t.client_id, role=t.role, weight=0.0) for t in plan.tasks if t.role is Role.IDLE
    )
    report = TurnReport(holders=checkpoint.holders, outcomes=idle)
    for attempt in range(1, federated.max_retries + 2):
        counted = {update.client_id for update in report.updates}
        turn = Turn(
            number=plan.round,
            run_id=server.run_id,
            tasks=tuple(task for task in working if task.client_id not in counted),
            adapter=checkpoint.state.adapter,
            reference=server.start if server.needs_reference else None,
            timeout=federated.round_timeout if server.run.launcher.keeps_time else math.inf,
        )
        report = report.merge(take_turn(server.grid, server.members, turn, report.holders, spool))
        lost = [outcome for outcome in report.outcomes if outcome.reason in ("crashed", "timeout")]
        if lost and not server.run.launcher.survives_lost_clients:
            raise UserError(
                f"round {plan.round}: {_told(lost)}. This launcher cannot go on without a client; {_way_out(plan.round)}"
            )
        if len(report.updates) >= wanted and not _owners_lost(working, report):
            return report, attempt
        log.warning(
            "round %d, attempt %d: %d usable updates, %d wanted", plan.round, attempt, len(report.updates), wanted
        )
    if len(report.updates) >= wanted:
        lost = [outcome for outcome in report.outcomes if outcome.role is Role.UNLEARN]
        raise UserError(
            f"round {plan.round}: no client that unlearns gave a usable update ({_told(lost)}): {_way_out(plan.round)}"
        )
    raise UserError(_too_few(plan.round, report, wanted, federated.max_retries))


def _owners_lost(working: Sequence[ClientTask], report: TurnReport) -> bool:
    """Whether clients were to unlearn this round and not one did: the others would go on and nothing would be forgotten."""
    owners = {task.client_id for task in working if task.role is Role.UNLEARN}
    return bool(owners) and owners.isdisjoint(update.client_id for update in report.updates)


def _too_few(number: int, report: TurnReport, wanted: int, retries: int) -> str:
    dropped = _told([outcome for outcome in report.outcomes if outcome.reason])
    return (
        f"round {number}: {len(report.updates)} usable updates after {retries} retries, trainer.federated.min_clients wants {wanted} ({dropped}). "
        f"Lower min_clients, or {_way_out(number)}"
    )


def _told(outcomes: Sequence[ClientOutcome]) -> str:
    return "; ".join(f"client {outcome.client_id}: {outcome.reason} ({outcome.detail})" for outcome in outcomes)


def _way_out(number: int) -> str:
    on_disk = f"everything up to round {number - 1} is on disk" if number > 1 else "no round is done yet"
    return f"mend the cause and go on with resume=true ({on_disk})"


def _metrics(clients: tuple[ClientOutcome, ...]) -> dict[str, float]:
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
