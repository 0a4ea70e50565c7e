"""Updates until enough count: the cohort is asked, the dropped are asked again, then others take their place."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from flwr.serverapp import Grid

from fedunlearn.aggregation.gate import MIN_FOR_NORMS, Verdict, judge_norms
from fedunlearn.config.run import TrainRun
from fedunlearn.errors import UserError
from fedunlearn.federation.faults import LOST
from fedunlearn.federation.link import Member
from fedunlearn.federation.parts import Depot
from fedunlearn.federation.planning import Planner
from fedunlearn.federation.roster import Roster
from fedunlearn.federation.spool import Spool
from fedunlearn.federation.turn import Holds, Turn, TurnReport, take_turn
from fedunlearn.methods.tokens import Memory
from fedunlearn.records.requests import ReleasedRow
from fedunlearn.records.rounds import ClientOutcome, ClientTask, Role, RoundPlan
from fedunlearn.records.shape import ClientShape

log = logging.getLogger(__name__)
TIMES_ASKED = 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """Whom to ask, and how. planner: over the members. shapes: clients' own ranks, empty where all have the adapter's. reads_reference: see Turn.

    mu: client -> proximal weight, where a Flower strategy configured the round: no others are asked then. reads_losses: see Turn.
    memories: what each client's method remembers of earlier rounds. released: see Turn. absent: clients that take no
    part in this round. renew: looks who is there by now, before somebody is asked again.
    """

    grid: Grid
    run: TrainRun
    run_id: str
    base_fingerprint: str
    members: Mapping[int, Member]
    planner: Planner
    shapes: Mapping[int, ClientShape]
    depot: Depot
    reads_reference: bool
    mu: Mapping[int, float] | None = None
    reads_losses: bool = False
    memories: Mapping[int, Memory] = field(default_factory=dict)
    released: tuple[ReleasedRow, ...] = ()
    absent: frozenset[int] = frozenset()
    renew: Callable[[], Roster] | None = None

    def plan(self, number: int, left_out: Collection[int] = ()) -> RoundPlan:
        """The round's plan, without clients that failed it for good."""
        away = self.absent.union(left_out)
        plan = self._remembering(self.planner.plan(number, away))
        return plan if self.mu is None else _with_mu(plan, self.mu)

    def _remembering(self, plan: RoundPlan) -> RoundPlan:
        """Those who unlearn are sent what they remember, the first time what the method begins with."""
        if self.run.local_method is None:
            return plan
        fresh = self.run.local_method.memory()
        return replace(
            plan,
            tasks=tuple(
                replace(task, memory=self.memories.get(task.client_id, fresh)) if task.role is Role.UNLEARN else task
                for task in plan.tasks
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Collected:
    """report: all outcomes and the updates that count. attempts: from 1. notes: what the gate did not judge, and why."""

    report: TurnReport
    attempts: int
    notes: tuple[str, ...]


def collect(call: Call, number: int, holds: Holds, spool: Spool) -> Collected:
    """Asks until trainer.federated.min_clients updates count (all working clients where there are fewer).

    A client that was dropped is asked once more, for it may have been bad luck; then it is left out of the round and whoever the draw has
    next takes its place. Raises UserError after max_retries repeats, when nobody is left to ask, or where clients were to unlearn and not one did.
    """
    federated, robust, plan = call.run.trainer.federated, call.run.robust, call.plan(number)
    wanted = min(max(federated.min_clients, robust.min_updates), len(_working(plan)))
    report = TurnReport(holds=holds, outcomes=_idle(plan))
    asked: Counter[int] = Counter()
    if not wanted:  # all who were drawn stand idle
        return Collected(report=report, attempts=1, notes=())
    retries = 0
    for attempt in range(1, federated.max_retries + 2):
        tasks = _open_tasks(plan, report, asked)
        if not tasks:
            break
        retries = attempt - 1
        asked.update(task.client_id for task in tasks)
        report = report.merge(take_turn(call.grid, call.members, _turn(call, plan, tasks), report.holds, spool))
        report = _without_the_odd(call, report)
        _check_launcher(call, plan.round, report)
        if len(report.updates) >= wanted and not _owners_lost(plan, report):
            return Collected(report=report, attempts=attempt, notes=_notes(call, report))
        log.warning(
            "round %d, attempt %d: %d usable updates, %d wanted", plan.round, attempt, len(report.updates), wanted
        )
        if call.renew is not None:
            roster = call.renew()
            call = replace(call, members=roster.members, planner=roster.planner)
        gone = {client for client, times in asked.items() if times >= TIMES_ASKED} - _counted(report)
        plan = call.plan(number, left_out=gone)
    raise UserError(_what_is_missing(plan.round, report, wanted, retries))


def _open_tasks(plan: RoundPlan, report: TurnReport, asked: Counter[int]) -> tuple[ClientTask, ...]:
    done = _counted(report)
    return tuple(task for task in _working(plan) if task.client_id not in done and asked[task.client_id] < TIMES_ASKED)


def _working(plan: RoundPlan) -> list[ClientTask]:
    return [task for task in plan.tasks if task.role is not Role.IDLE]


def _idle(plan: RoundPlan) -> tuple[ClientOutcome, ...]:
    return tuple(
        ClientOutcome(client_id=t.client_id, role=t.role, weight=0.0) for t in plan.tasks if t.role is Role.IDLE
    )


def _counted(report: TurnReport) -> set[int]:
    return {update.client_id for update in report.updates}


def _turn(call: Call, plan: RoundPlan, tasks: tuple[ClientTask, ...]) -> Turn:
    run = call.run
    return Turn(
        number=plan.round,
        run_id=call.run_id,
        base_fingerprint=call.base_fingerprint,
        tasks=tasks,
        depot=call.depot,
        reads_reference=call.reads_reference,
        shapes=call.shapes,
        max_reply_ratio=run.gate.max_reply_ratio,
        max_update_ratio=run.gate.max_update_ratio,
        reads_losses=call.reads_losses,
        released=call.released,
        timeout=run.round_deadline,
    )


def _without_the_odd(call: Call, report: TurnReport) -> TurnReport:
    """Drops updates that go too far beside the others of their role, all that came so far taken together."""
    ratio = call.run.gate.max_norm_ratio
    if ratio is None:
        return report
    odd: dict[int, Verdict] = {}
    for norms in _norms_by_role(report, "factor_norm").values():
        odd |= {k: Verdict(v.reason, f"factors: {v.detail}") for k, v in judge_norms(norms, ratio).items()}
    for norms in _norms_by_role(report, "update_norm").values():
        odd |= judge_norms(norms, ratio)
    for client, verdict in odd.items():
        log.warning("client %d is dropped this round: %s (%s)", client, verdict.reason, verdict.detail)
    return report.without(odd)


def _norms_by_role(report: TurnReport, of: Literal["update_norm", "factor_norm"]) -> dict[Role, dict[int, float]]:
    """Gives each client's norm: of its update as a product, or of its factors, which a mean of factors sees (c A and B / c are the same product)."""
    roles = {outcome.client_id: outcome.role for outcome in report.outcomes}
    norms: dict[Role, dict[int, float]] = {}
    for update in report.updates:
        norms.setdefault(roles[update.client_id], {})[update.client_id] = getattr(update, of)
    return norms


def _notes(call: Call, report: TurnReport) -> tuple[str, ...]:
    if call.run.gate.max_norm_ratio is None:
        return ()
    return tuple(
        f"gate.max_norm_ratio is off for {role.value}: {len(norms)} updates, {MIN_FOR_NORMS} are wanted to tell who is odd"
        for role, norms in sorted(_norms_by_role(report, "update_norm").items())
        if len(norms) < MIN_FOR_NORMS
    )


def check_all_there(run: TrainRun, missing: Sequence[str]) -> None:
    """Raises UserError, with a sentence for each client that is missing, under a launcher that cannot go on without one."""
    if missing and not run.launcher.survives_lost_clients:
        raise UserError(*missing, "This launcher cannot go on without a client: mend the cause; resume=true goes on")


def _check_launcher(call: Call, number: int, report: TurnReport) -> None:
    lost = [outcome for outcome in report.outcomes if outcome.reason in LOST]
    if lost and not call.run.launcher.survives_lost_clients:
        raise UserError(
            f"round {number}: {_told(lost)}. This launcher cannot go on without a client; {_way_out(number)}"
        )


def _owners_lost(plan: RoundPlan, report: TurnReport) -> bool:
    """Whether clients were to unlearn this round and not one did: the others would go on and nothing would be forgotten."""
    roles = {outcome.client_id: outcome.role for outcome in report.outcomes}
    owners = {client for client, role in roles.items() if role is Role.UNLEARN}
    owners |= {task.client_id for task in plan.tasks if task.role is Role.UNLEARN}
    return bool(owners) and owners.isdisjoint(_counted(report))


def _what_is_missing(number: int, report: TurnReport, wanted: int, retries: int) -> str:
    if len(report.updates) >= wanted:
        lost = [outcome for outcome in report.outcomes if outcome.role is Role.UNLEARN]
        return f"round {number}: no client that unlearns gave a usable update ({_told(lost)}): {_way_out(number)}"
    dropped = _told([outcome for outcome in report.outcomes if outcome.reason])
    return (
        f"round {number}: {len(report.updates)} usable updates after {retries} retries, trainer.federated.min_clients (or robust) wants {wanted} ({dropped}). "
        f"Lower min_clients, raise max_retries, or {_way_out(number)}"
    )


def _told(outcomes: Sequence[ClientOutcome]) -> str:
    return "; ".join(f"client {outcome.client_id}: {outcome.reason} ({outcome.detail})" for outcome in outcomes)


def _way_out(number: int) -> str:
    on_disk = f"everything up to round {number - 1} is on disk" if number > 1 else "no round is done yet"
    return f"mend the cause and go on with resume=true ({on_disk})"


def _with_mu(plan: RoundPlan, mu: Mapping[int, float]) -> RoundPlan:
    tasks = [task for task in plan.tasks if task.client_id in mu or task.role is Role.IDLE]
    return replace(plan, tasks=tuple(replace(task, mu=mu.get(task.client_id, 0.0)) for task in tasks))
