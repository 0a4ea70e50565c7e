"""A server-side method carried out: what its rounds begin with, whom they leave out, and its own steps."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fedunlearn.aggregation.base import cast_like
from fedunlearn.aggregation.choices import gauge_of, reducer_of, trained_in
from fedunlearn.aggregation.factors import Factors, Module, fresh_a, modules_of
from fedunlearn.aggregation.product import LowRank, product_of, weighted_sum
from fedunlearn.aggregation.reduce import Choices, Cohort, ReadTensor, reduce_round
from fedunlearn.aggregation.robust.off import Off
from fedunlearn.errors import UserError
from fedunlearn.federation.checkpoint import Checkpoint
from fedunlearn.federation.ledger import Ledger
from fedunlearn.federation.past import Past
from fedunlearn.federation.server_step import BLOCK, Stepped, Stepper, check_beside
from fedunlearn.federation.start import Start
from fedunlearn.models.export import unit_scaled
from fedunlearn.protocols.base import Stage
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.ledger import GLOBAL, LedgerEntry
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
            return replace(present, state=replace(present.state, adapter=self._others_mean(present)))
        found = self._earlier()
        if beginning == "rollback":
            return found
        state = replace(found.state, round=0, moments={} if beginning == "rewind" else found.state.moments)
        return replace(found, state=state)

    def _earlier(self) -> Checkpoint:
        past, number = self._past, self._past.round_of(self.method, self.all_targets)
        if self.method.beginning == "rollback" and number == 1:
            log.warning("the targets were there from round 1: this rollback is the retrain")
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

    def _others_mean(self, present: Checkpoint) -> Tensors:
        """Sum p_k x_k over those who are no targets, of the last fine-tuning round, weights scaled to sum 1; float64 sums."""
        entries = self._past.updates(self._past.num_rounds)
        others = {client: entry for client, entry in sorted(entries.items()) if client not in self.all_targets}
        total = sum(entry.weight for entry in others.values())
        if total <= 0:
            raise UserError(
                f"method {type(self.method).__name__}: nobody but the targets counted in the last round of {str(self._past.folder)!r}, there is no mean of the others"
            )
        ledger, mean = Ledger(self._past.folder), dict[str, torch.Tensor]()
        for entry in others.values():
            for name, tensor in ledger.read(entry).items():
                share = tensor.double() * (entry.weight / total)
                mean[name] = mean[name] + share if name in mean else share
        return {**present.state.adapter, **{name: t.to(present.state.adapter[name].dtype) for name, t in mean.items()}}

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
        names = [name for name in cohort.adapter if cohort.trained.covers(name)]
        held = {client: {name: cohort.read(client, name).clone() for name in names} for client in cohort.weights}
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
        entries = {k: e for k, e in self._past.updates(number).items() if k not in self.all_targets}
        total = sum(entry.weight for entry in entries.values())
        if total <= 0:
            raise UserError(
                f"method {type(self.method).__name__}: nobody but the targets counted in round {number} of {str(self._past.folder)!r}: choose rollback, or another interval"
            )
        return replace(
            cohort,
            weights={client: entry.weight / total for client, entry in entries.items()},
            read=self._reader(entries),
            trained=trained_in(self.stepper.run.aggregation.mask, number),
            adapter=before.state.adapter,
        )

    def _reader(self, entries: Mapping[int, LedgerEntry]) -> ReadTensor:
        ledger, kept = Ledger(self._past.folder), dict[int, Tensors]()

        def read(client: int, name: str) -> torch.Tensor:
            if client not in kept:
                kept[client] = ledger.read(entries[client])
            return kept[client][name]

        return read

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
            updates=tuple(self._contribution(cohort, cohort.read, k, w) for k, w in sorted(cohort.weights.items())),
            held=tuple(
                self._contribution(cohort, lambda k, name: before.held[k][name], k, 0.0) for k in sorted(before.held)
            ),
            contributions=tuple(self._contributions()) if self.method.reads_contributions else (),
            old_norms=norms,
        )

    def _whole(self, adapter: Tensors, beside: Callable[[Module], LowRank | None]) -> ReadProduct:
        own = self._product(adapter)

        def read(module: Module) -> LowRank:
            block = beside(module)
            return own(module) if block is None else weighted_sum([1.0, 1.0], [own(module), block])

        return read

    def _product(self, adapter: Tensors) -> ReadProduct:
        return lambda module: product_of(
            Factors(adapter[module.b], adapter[module.a], self.stepper.scales[module.name]).double
        )

    def _contribution(self, cohort: Cohort, read: ReadTensor, client: int, weight: float) -> Contribution:
        def new(module: Module) -> LowRank:
            b, a = (
                read(client, name) if cohort.trained.covers(name) else cohort.adapter[name]
                for name in (module.b, module.a)
            )
            return product_of(Factors(b, a, self.stepper.scales[module.name]).double)

        return Contribution(client_id=client, weight=weight, new=new, old=self._product(cohort.adapter))

    def _contributions(self) -> Iterator[Contribution]:
        """The targets' updates of fine-tuning, round after round, each against the adapter of its round."""
        ledger = Ledger(self._past.folder)
        for first in (entry for entry in self._past.entries if entry.kind == "global" and entry.client_id == GLOBAL):
            mine = {k: e for k, e in self._past.updates(first.round).items() if k in self.targets}
            if not mine:
                continue
            old = ledger.read(first)
            for client, entry in sorted(mine.items()):
                new = {**old, **ledger.read(entry)}
                yield Contribution(
                    client_id=client, weight=entry.weight, new=self._product(new), old=self._product(old)
                )


def _as_stored(before: Checkpoint, mean: Tensors) -> Tensors:
    return cast_like(mean, {name: before.state.adapter[name] for name in mean})
