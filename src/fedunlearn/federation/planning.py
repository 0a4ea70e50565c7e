"""The plan of a round: cohort, roles, seeds and learning rates, all functions of the config, of who owns how many rows, and of the round."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from fedunlearn.aggregation.choices import trained_in
from fedunlearn.config.run import TrainRun
from fedunlearn.errors import UserError
from fedunlearn.protocols.selection import select
from fedunlearn.records.rounds import ClientRows, ClientTask, Role, RoundPlan
from fedunlearn.seeds import seed_of

NOBODY = (
    "nobody unlearned: no owner of forget rows is drawn in any round. Raise trainer.federated.fraction_train or num_rounds, "
    "or set trainer.federated.force_owners=true, and start anew (overwrite=true where the run's folder exists)"
)
GONE = (
    "nobody can unlearn: the owners of the request's rows are gone, by target=gone of this request or of an earlier one. Choose a server-side method: "
    "rollback, federaser, negation or fused"
)


@dataclass(frozen=True, eq=False)
class Planner:
    """Plans of a run. rows: of every client that takes part, by id.

    A draw goes over all of them, so each round's is made once and kept; only who fails a round has it drawn anew.
    """

    run: TrainRun
    rows: Mapping[int, ClientRows]
    _drawn: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def plan(self, number: int, left_out: Collection[int] = ()) -> RoundPlan:
        """As plan_round."""
        return _planned(self.run, number, [self.rows[client] for client in self._cohort(number, left_out)])

    def _cohort(self, number: int, left_out: Collection[int]) -> tuple[int, ...]:
        if left_out:
            return _draw(self.run, self.rows, number, left_out)
        if number not in self._drawn:
            self._drawn[number] = _draw(self.run, self.rows, number, ())
        return self._drawn[number]


def plan_round(run: TrainRun, rows: Mapping[int, ClientRows], number: int, left_out: Collection[int] = ()) -> RoundPlan:
    """Draws the cohort, asks the protocol for roles, and gives every client its seed and learning rate.

    rows: of every client that takes part, by id. left_out: clients that failed this round for good; others are drawn in their place. Clients that
    join later are not there yet, and one without a row to work on never is: where fine-tuning is replayed, without a retain row, as in the oracle.
    """
    return Planner(run, rows).plan(number, left_out)


def _draw(run: TrainRun, rows: Mapping[int, ClientRows], number: int, left_out: Collection[int]) -> tuple[int, ...]:
    federated, at = run.trainer.federated, run.origin_round(number)
    works = {k for k, has in rows.items() if (has.num_retain if run.replays else has.some)}
    there = [k for k in rows if k in works and k not in left_out and run.partition.joins_at(k) <= at]
    owners = [client for client in there if federated.force_owners and rows[client].num_forget]
    forced = there if run.draws_all(number) else owners
    return select(there, seed=run.trainer.args.seed, round=at, count=federated.cohort_size, forced=forced)


def _planned(run: TrainRun, number: int, cohort: Sequence[ClientRows]) -> RoundPlan:
    args, federated, at = run.trainer.args, run.trainer.federated, run.origin_round(number)
    progress = (at - 1) / max(federated.num_rounds - 1, 1)
    scale = 1.0 + (federated.final_lr_ratio - 1.0) * progress
    return RoundPlan(
        round=number,
        tasks=tuple(
            ClientTask(
                client_id=part.client_id,
                role=part.role,
                epochs=part.epochs,
                share=part.share,
                lr_scale=scale,
                seed=seed_of("client", args.seed, part.client_id, at),
                mu=run.strategy.client_mu,
                trained=trained_in(run.aggregation.mask, at),
                radius=run.radius(number) if part.role is Role.UNLEARN else 0.0,
            )
            for part in run.assign(number, cohort)
        ),
    )


def check_plans(run: TrainRun, rows: Mapping[int, ClientRows]) -> Planner:
    """Gives the planner of a run. Raises UserError, before any training, for what no round of the whole plan can give: plans are functions of the seed.

    Asked before the run's folder is made, by who owns what, and again once it is known who takes part. No owner of forget rows is ever drawn; or a round has fewer working clients than the robust weights need.
    """
    planner = Planner(run, rows)
    plans = [planner.plan(number) for number in range(1, run.total_rounds + 1)]
    if (
        run.mode == "unlearn"
        and run.server_method is None
        and not any(task.role is Role.UNLEARN for plan in plans for task in plan.tasks)
    ):
        there = any(has.num_forget for has in rows.values())
        raise UserError(NOBODY if there or run.protocol.releases else GONE)
    _check_owner_rounds(run, plans)
    for plan in plans:
        working = len([task for task in plan.tasks if task.role is not Role.IDLE])
        if 0 < working < run.robust.min_updates:
            raise UserError(
                f"robust {type(run.robust).__name__} needs {run.robust.min_updates} updates, but round {plan.round} has {working} working clients "
                f"(protocol {type(run.protocol).__name__}): draw more, choose another protocol, or robust=off, and start anew (overwrite=true where the run's folder exists)"
            )
    return planner


def _check_owner_rounds(run: TrainRun, plans: Sequence[RoundPlan]) -> None:
    """Raises UserError for a round in which a server-side method needs an owner at work and none is drawn, or that is not there at all."""
    method = run.server_method
    for number in () if method is None else method.owner_rounds(run.total_rounds):
        at = f"method {type(method).__name__} needs an owner of forget rows at work in round {number}"
        if number > len(plans):
            raise UserError(f"{at}, and trainer.federated.num_rounds={len(plans)} ends before: raise it")
        if not any(task.role.on_forget_rows for task in plans[number - 1].tasks):
            raise UserError(
                f"{at}, and none is drawn: set trainer.federated.force_owners=true, or raise fraction_train or num_train_clients"
            )
