"""A server-side method carried out: what its rounds begin with, whom they leave out, and its own steps."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch

from fedunlearn.aggregation.base import ServerState, cast_like
from fedunlearn.aggregation.choices import gauge_of, reducer_of, trained_in
from fedunlearn.aggregation.factors import Factors, Module, fresh_a, modules_of
from fedunlearn.aggregation.product import LowRank, product_of, weighted_sum
from fedunlearn.aggregation.reduce import Choices, Cohort, ReadTensor, reduce_round
from fedunlearn.aggregation.robust.off import Off
from fedunlearn.errors import UserError
from fedunlearn.federation.checkpoint import Checkpoint
from fedunlearn.federation.ledger import Ledger
from fedunlearn.federation.past import Past
from fedunlearn.federation.server_step import BLOCK, Stepped, Stepper, averaged, check_beside
from fedunlearn.federation.start import Start
from fedunlearn.models.export import unit_scaled
from fedunlearn.protocols.base import Stage
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.ledger import LedgerEntry
from fedunlearn.records.rounds import Trained
from fedunlearn.seeds import seed_of
from fedunlearn.server_methods.base import Change, Contribution, Scene, ServerMethod, ServerStep
from fedunlearn.server_methods.linear import ReadProduct

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Conductor:
    """past: the fine-tuning run, where the method reads it. targets: owners of the request's rows; all_targets: and of those that
    earlier requests took, whose old updates no replay may bring back.
    """

    method: ServerMethod
    stepper: Stepper
    start: Start
    past: Past | None
    targets: frozenset[int]
    all_targets: frozenset[int]

    def begin(self, present: Checkpoint) -> Checkpoint:
        """Gives what the first round begins with. present: the adapter as it is. Raises UserError where it is not to be had."""
        beginning = self.method.beginning
        if beginning == "present":
            return present
        if beginning == "fresh":
            return self._fresh(present)
        if beginning == "others":
            return self._others(present)
        found = self._earlier()
        if beginning == "rollback":
            return found
        state = replace(found.state, round=0, moments={} if beginning == "rewind" else found.state.moments)
        return replace(found, state=state)

    def _earlier(self) -> Checkpoint:
        number = self._past.round_of(self.method, self.all_targets)
        if self.method.beginning == "rollback" and number == 1:
            log.warning("the targets were there from round 1: this rollback is the retrain")
        return self._taken(number)

    def _taken(self, number: int) -> Checkpoint:
        """What a fine-tuning round began with, its side-car in this run's own store."""
        past = self._past
        found = past.before(number)
        blocks = tuple(self.stepper.store.take(past.folder, name) for name in found.blocks)
        return replace(found, blocks=blocks, holds={}, memories={})

    @property
    def _past(self) -> Past:
        if self.past is None:
            raise ValueError(f"{type(self.method).__name__} reads the past and has none")
        return self.past

    def _fresh(self, present: Checkpoint) -> Checkpoint:
        """Fresh factors; the present adapter as one more block beside its side-car."""
        frozen = self.stepper.store.keep(unit_scaled(self.start.adapter))
        generator = torch.Generator().manual_seed(seed_of("fused", self.stepper.run.trainer.args.seed))
        factors = dict(present.state.adapter)
        for module in modules_of(factors):
            factors[module.a] = fresh_a(factors[module.a].shape, generator)
            factors[module.b] = torch.zeros_like(factors[module.b])
        return replace(present, state=replace(present.state, adapter=factors), blocks=(*present.blocks, frozen))

    def _others(self, present: Checkpoint) -> Checkpoint:
        """What fine-tuning's last round would have given without the targets: the mean of the others, as that run averaged."""
        past, number = self._past, self._past.num_rounds
        weights = self._others_weights(number)
        read = self._reader(past.updates(number))
        found = averaged(replace(self.stepper, run=past.run), self._taken(number), weights, read)
        return replace(present, state=ServerState(adapter=found.state.adapter), blocks=found.blocks)

    def _others_weights(self, number: int) -> dict[int, float]:
        """p_k of a fine-tuning round over those who are no targets, scaled to sum 1. Raises UserError where there is nobody."""
        others = {
            k: entry.weight for k, entry in sorted(self._past.updates(number).items()) if k not in self.all_targets
        }
        total = sum(others.values())
        if total <= 0:
            raise UserError(
                f"method {type(self.method).__name__}: nobody but the targets counted in round {number} of {str(self._past.folder)!r}, there is no mean of the "
                "others: choose another method (federaser: another interval)"
            )
        return {client: weight / total for client, weight in others.items()}

    def absent(self, number: int) -> frozenset[int]:
        """Clients that take no part in a round beside those that are gone: in FedEraser's replay those that were not there then."""
        if self.method.beginning != "origin":
            return frozenset()
        there = self._past.updates(self.method.origin_round(number))
        return frozenset(range(len(self.start.rows))) - frozenset(there)

    def steps_itself(self, number: int) -> bool:
        """Whether this round's step is the method's own."""
        return self.method.step(self._stage(number)) is ServerStep.OWN

    def _stage(self, number: int) -> Stage:
        return Stage(round=number, num_rounds=self.stepper.run.total_rounds)

    def step(self, before: Checkpoint, cohort: Cohort) -> Stepped:
        """Makes the method's own step. cohort: this round's updates, weighed; nobody's where the method needs none."""
        stage = self._stage(before.state.round + 1)
        if self.method.as_they_were(stage):
            cohort = self._as_they_were(before, cohort, self.method.origin_round(stage.round))
        change = self.method.change(self._scene(stage, before, cohort))
        if change.hold:
            return self._held(before, cohort)
        after = self._applied(before, cohort, change)
        return replace(after, figures=change.figures)

    def _held(self, before: Checkpoint, cohort: Cohort) -> Stepped:
        """What each client has now, both factors: the next round may train the other one."""
        held = {
            client: {
                name: _trained_or(
                    cohort.trained, partial(cohort.read, client), cohort.adapter.__getitem__, name
                ).clone()
                for name in cohort.adapter
            }
            for client in cohort.weights
        }
        state = replace(before.state, round=before.state.round + 1)
        return Stepped(after=replace(before, state=state, held=held), weights=cohort.weights)

    def _applied(self, before: Checkpoint, cohort: Cohort, change: Change) -> Stepped:
        state, blocks = replace(before.state, round=before.state.round + 1), before.blocks
        if change.weights is not None:
            reduced = reduce_round(self._choices, cohort, change.weights)
            state = replace(state, adapter={**before.state.adapter, **_as_stored(before, reduced.mean)})
            check_beside(state.round, {"the mean": state.adapter})
            after = replace(before, state=state, held={})
            return Stepped(after=after, weights=cohort.weights, error=reduced.error, norm=reduced.norm)
        if change.from_start:
            state, blocks = replace(state, adapter=self.start.adapter.tensors), self.start.blocks
        check_beside(state.round, {BLOCK: change.block})
        if change.block:
            blocks = (*blocks, self.stepper.store.keep(change.block))
        return Stepped(after=replace(before, state=state, blocks=blocks, held={}), weights=cohort.weights)

    @cached_property
    def _choices(self) -> Choices:
        """The best rank r of the exact sum; the gauge is the run's own where it goes with that."""
        gauge = self.stepper.run.aggregation.gauge
        return Choices(
            reducer=reducer_of("product", None),
            gauge=gauge_of(gauge if gauge == "orthonormal" else "balanced", None),
            robust=Off(),
        )

    def _as_they_were(self, before: Checkpoint, cohort: Cohort, number: int) -> Cohort:
        """The remaining clients' updates of a fine-tuning round, from the ledger; a target's is left out whole."""
        return replace(
            cohort,
            weights=self._others_weights(number),
            read=self._reader(self._past.updates(number)),
            trained=trained_in(self.stepper.run.aggregation.mask, number),
            adapter=before.state.adapter,
        )

    def _reader(self, entries: Mapping[int, LedgerEntry]) -> ReadTensor:
        ledger = Ledger(self._past.folder)
        return lambda client, name: ledger.read_tensor(entries[client], name)

    def _scene(self, stage: Stage, before: Checkpoint, cohort: Cohort) -> Scene:
        store = self.stepper.store
        number = self.method.origin_round(stage.round)
        norms = {}
        if self.method.beginning == "origin" and not self.method.as_they_were(stage):
            norms = {client: entry.norms or {} for client, entry in self._past.updates(number).items()}
        return Scene(
            stage=stage,
            modules=modules_of(cohort.adapter),
            now=self._whole(before.state.adapter, lambda module: store.of_module(before.blocks, module)),
            start=self._whole(self.start.adapter.tensors, lambda module: store.of_module(self.start.blocks, module)),
            updates=tuple(
                self._contribution(
                    cohort,
                    k,
                    w,
                    partial(_trained_or, cohort.trained, partial(cohort.read, k), cohort.adapter.__getitem__),
                )
                for k, w in sorted(cohort.weights.items())
            ),
            held=tuple(self._contribution(cohort, k, 0.0, held.__getitem__) for k, held in sorted(before.held.items())),
            contributions=tuple(self._contributions()) if self.method.reads_contributions else (),
            old_norms=norms,
        )

    def _whole(self, adapter: Tensors, beside: Callable[[Module], LowRank | None]) -> ReadProduct:
        own = self._product(adapter.__getitem__)

        def read(module: Module) -> LowRank:
            block = beside(module)
            return own(module) if block is None else weighted_sum([1.0, 1.0], [own(module), block])

        return read

    def _product(self, read: Callable[[str], torch.Tensor]) -> ReadProduct:
        return lambda module: product_of(
            Factors(read(module.b), read(module.a), self.stepper.scales[module.name]).double
        )

    def _contribution(
        self, cohort: Cohort, client: int, weight: float, new: Callable[[str], torch.Tensor]
    ) -> Contribution:
        old = self._product(cohort.adapter.__getitem__)
        return Contribution(client_id=client, weight=weight, new=self._product(new), old=old)

    def _contributions(self) -> Iterator[Contribution]:
        """The targets' updates of fine-tuning, round after round, each against the adapter of its round; read when they are asked for."""
        past, ledger = self._past, Ledger(self._past.folder)
        for first in (entry for entry in past.entries if entry.kind == "global"):
            trained = trained_in(past.run.aggregation.mask, first.round)
            old = partial(ledger.read_tensor, first)
            for client, entry in sorted(past.updates(first.round).items()):
                if client in self.targets:
                    new = partial(_trained_or, trained, partial(ledger.read_tensor, entry), old)
                    yield Contribution(
                        client_id=client, weight=entry.weight, new=self._product(new), old=self._product(old)
                    )


def _trained_or(
    trained: Trained, sent: Callable[[str], torch.Tensor], kept: Callable[[str], torch.Tensor], name: str
) -> torch.Tensor:
    """A client's tensor: what it sent where it trained that factor, else what it was sent."""
    return sent(name) if trained.covers(name) else kept(name)


def _as_stored(before: Checkpoint, mean: Tensors) -> Tensors:
    return cast_like(mean, {name: before.state.adapter[name] for name in mean})
