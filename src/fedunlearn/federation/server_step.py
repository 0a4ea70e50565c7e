"""The server's step: from the updates in the spool to the next global adapter, its side-car, and what was lost on the way."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedunlearn.aggregation.adalora import AdaLora
from fedunlearn.aggregation.after_step import checked_state, not_finite, step_fault
from fedunlearn.aggregation.base import ServerOptimizer, ServerState, cast_like
from fedunlearn.aggregation.choices import gauge_of, reducer_of, trained_in
from fedunlearn.aggregation.factors import modules_of
from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.aggregation.gate import cap_shares
from fedunlearn.aggregation.reduce import Choices, Cohort, ReadTensor, Reduced, aggregation_error, reduce_round
from fedunlearn.aggregation.robust.off import Off
from fedunlearn.aggregation.weights import client_weights
from fedunlearn.config.run import TrainRun
from fedunlearn.errors import UserError
from fedunlearn.federation.block_store import BlockStore
from fedunlearn.federation.checkpoint import Checkpoint
from fedunlearn.federation.flower_strategy import WrappedStrategy
from fedunlearn.federation.rank_budget import error_of_triplets, with_mask, without_update
from fedunlearn.federation.turn import TurnReport
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.shape import ClientShape

log = logging.getLogger(__name__)
BLOCK = "the side-car's block"


@dataclass(frozen=True, kw_only=True, eq=False)
class Stepper:
    """What the step knows from start to end of a run. scales: s by module name. shapes: clients' own ranks, empty where all have the adapter's.

    foreign: the user's Flower strategy, built; None where the strategy is ours.
    """

    run: TrainRun
    store: BlockStore
    scales: Mapping[str, float]
    shapes: Mapping[int, ClientShape]
    foreign: WrappedStrategy | None = None

    @property
    def strategy_name(self) -> str:
        """The class that makes the server's state, as a checkpoint names it."""
        strategy = self.run.strategy
        if isinstance(strategy, FlowerStrategy):
            return strategy.target
        return f"{type(strategy).__module__}.{type(strategy).__qualname__}"

    @property
    def budget(self) -> AdaLora | None:
        """What AdaLoRA's server gives out; None for plain LoRA."""
        lora = self.run.model.model_args.lora_config
        return None if lora is None else lora.adalora

    @property
    def averaged(self) -> str:
        """What makes the mean, for the history."""
        if self.foreign is not None:
            return f"{self.strategy_name} (per factor)"
        return self.run.aggregation.reducer


@dataclass(frozen=True, kw_only=True, eq=False)
class Stepped:
    """after: the checkpoint, still with the parts that clients held before. weights: client -> what it counted for. capped: whom gate.max_client_share held down.

    figures: what a server-side method measured, or how many ranks AdaLoRA's mask left.
    """

    after: Checkpoint
    weights: Mapping[int, float] = field(default_factory=dict)
    capped: frozenset[int] = frozenset()
    error: float | None = None
    norm: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


def step(
    stepper: Stepper, before: Checkpoint, report: TurnReport, nodes: Mapping[int, int], read: ReadTensor
) -> Stepped:
    """Weighs, reduces and steps. nodes: client id -> node id, for strategies of Flower's. read: (client, name) -> tensor of the spool."""
    run = stepper.run
    cohort, capped = weigh(stepper, before, report, read)
    if stepper.foreign is not None:
        return _foreign_step(stepper, stepper.foreign, before, cohort, nodes, report, capped)
    reduced = reduce_round(_choices(run), cohort)
    check_beside(cohort.round, {BLOCK: reduced.block, "what error feedback carries": reduced.carried})
    state = _optimise(run.strategy, stepper.strategy_name, before.state, reduced.mean)
    after = replace(before, state=state, blocks=_new_blocks(stepper, before, reduced), carried=reduced.carried)
    error, norm, figures = reduced.error, reduced.norm, dict[str, float]()
    if stepper.budget is not None:
        after, kept = with_mask(stepper.budget, run.total_rounds, before, after, reduced)
        (error, norm), figures = error_of_triplets(cohort, reduced), {"ranks": float(kept)}
    return replace(_stepped(after, reduced.weights, capped, error, norm), figures=figures)


def no_step(stepper: Stepper, before: Checkpoint) -> Stepped:
    """Gives a round in which nothing counted: all stays as it is, but that AdaLoRA's ranks settle in time."""
    number = before.state.round + 1
    log.warning("round %d: no client of the cohort had anything to do; the global adapter stays as it is", number)
    after = replace(before, state=replace(before.state, round=number))
    if stepper.budget is None:
        return Stepped(after=after)
    after, kept = without_update(stepper.budget, stepper.run.total_rounds, after)
    if after.adapter_hash != before.adapter_hash:
        log.warning(
            "round %d: but AdaLoRA's ranks settle by now, by what earlier rounds tell: %d are left", number, kept
        )
    return Stepped(after=after, figures={"ranks": float(kept)})


def averaged(stepper: Stepper, before: Checkpoint, weights: Mapping[int, float], read: ReadTensor) -> Checkpoint:
    """Gives what the mean of one round's updates makes of a checkpoint, side-car included; no optimiser steps, nobody is re-weighed."""
    cohort = _cohort(stepper, before, weights, read, before.state.round + 1)
    reduced = reduce_round(replace(_choices(stepper.run), robust=Off(), feedback=False), cohort)
    mean = cast_like(reduced.mean, {name: before.state.adapter[name] for name in reduced.mean})
    check_beside(cohort.round, {BLOCK: reduced.block, "the mean": mean})
    state = ServerState(round=cohort.round, adapter={**before.state.adapter, **mean})
    return replace(before, state=state, blocks=_new_blocks(stepper, before, reduced))


def _stepped(
    after: Checkpoint, weights: Mapping[int, float], capped: frozenset[int], error: float, norm: float
) -> Stepped:
    """What is no number is not told: history.jsonl is strict JSON."""
    told = [value if math.isfinite(value) else None for value in (error, norm)]
    return Stepped(after=after, weights=weights, capped=capped, error=told[0], norm=told[1])


def check_beside(number: int, kept: Mapping[str, Tensors]) -> None:
    """Raises UserError where what goes beside the factors, told by its name, holds an entry that is not finite."""
    for what, tensors in kept.items():
        bad = not_finite(tensors)
        if bad is not None:
            raise UserError(
                f"aggregation, round {number}: {what} has entries in {bad!r} that are not finite; nothing of this round is kept: "
                "choose aggregation.residual=dropped, or lower trainer.args.learning_rate or lora_alpha, and start anew with overwrite=true"
            )


def weigh(stepper: Stepper, before: Checkpoint, report: TurnReport, read: ReadTensor) -> tuple[Cohort, frozenset[int]]:
    """Gives the round's cohort with its shares, and whom gate.max_client_share held down; where nobody sent anything, nobody's."""
    run, capped = stepper.run, frozenset[int]()
    shares = client_weights(report.updates, run.aggregation.weights) if report.updates else {}
    if run.gate.max_client_share is not None and shares:
        shares, capped = cap_shares(shares, run.gate.max_client_share)
    return _cohort(stepper, before, shares, read, before.state.round + 1), capped


def _choices(run: TrainRun) -> Choices:
    chosen = run.aggregation
    return Choices(
        reducer=reducer_of(chosen.reducer, chosen.trim),
        gauge=gauge_of(chosen.gauge, chosen.softness),
        robust=run.robust,
        sidecar=chosen.residual == "sidecar",
        feedback=chosen.residual == "feedback",
        sidecar_rank=chosen.sidecar_rank,
    )


def _cohort(stepper: Stepper, before: Checkpoint, shares: Mapping[int, float], read: ReadTensor, number: int) -> Cohort:
    adapter, run = before.state.adapter, stepper.run
    return Cohort(
        adapter=adapter,
        scales=stepper.scales,
        weights=shares,
        read=read,
        round=number,
        seed=run.trainer.args.seed,
        trained=trained_in(run.aggregation.mask, run.origin_round(number)),
        shapes=stepper.shapes,
        carried=before.carried,
        blocks=lambda module: stepper.store.of_module(before.blocks, module),
        block_rank=stepper.store.rank_of(before.blocks, modules_of(adapter)),
    )


def _optimise(strategy: ServerOptimizer | FlowerStrategy, name: str, state: ServerState, mean: Tensors) -> ServerState:
    """Steps over the tensors that have a mean: the others, and their moments, rest. Raises UserError for a step that cannot be gone on from."""
    if not isinstance(strategy, ServerOptimizer):
        raise TypeError("a strategy of Flower's steps by itself")
    part = replace(
        state,
        adapter={name: state.adapter[name] for name in mean},
        moments={key: {n: t for n, t in kept.items() if n in mean} for key, kept in state.moments.items()},
    )
    try:
        stepped = strategy.step(part, mean)
    except Exception as error:  # a user's own class may raise anything
        raise step_fault(name, state.round + 1, f"its step raised {type(error).__name__}: {error}") from error
    stepped = checked_state(name, part, stepped, strategy.moment_names)
    return replace(
        stepped,
        adapter={**state.adapter, **stepped.adapter},
        moments={key: {**state.moments.get(key, {}), **kept} for key, kept in stepped.moments.items()},
    )


def _new_blocks(stepper: Stepper, before: Checkpoint, reduced: Reduced) -> tuple[str, ...]:
    if not reduced.block:
        return before.blocks
    name = stepper.store.keep(reduced.block)
    return (name,) if reduced.replaces else (*before.blocks, name)


def _foreign_step(
    stepper: Stepper,
    strategy: WrappedStrategy,
    before: Checkpoint,
    cohort: Cohort,
    nodes: Mapping[int, int],
    report: TurnReport,
    capped: frozenset[int],
) -> Stepped:
    active = {name: t for name, t in cohort.adapter.items() if cohort.trained.covers(name)}
    losses = {update.client_id: update.loss for update in report.updates}
    result = strategy.aggregate(cohort.round, cohort.weights, nodes, cohort.read, active, losses)
    adapter = {name: result[name].to(t.dtype) if name in result else t for name, t in cohort.adapter.items()}
    state = checked_state(
        stepper.strategy_name, before.state, replace(before.state, adapter=adapter, round=cohort.round), ()
    )
    error, norm = aggregation_error(cohort, state.adapter)
    after = replace(before, state=state, foreign=strategy.state())
    return _stepped(after, cohort.weights, capped, error, norm)
