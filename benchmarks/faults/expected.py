"""What a run must come to, worked out without the round loop: no grid, no messages, no gate, no files of a round."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from fedunlearn.aggregation.base import ServerOptimizer, ServerState
from fedunlearn.aggregation.choices import gauge_of, reducer_of, trained_in
from fedunlearn.aggregation.factors import cut_to, modules_of, scales_of
from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.aggregation.gate import cap_shares
from fedunlearn.aggregation.reduce import Choices, Cohort, reduce_round
from fedunlearn.config.run import TrainRun
from fedunlearn.federation.block_store import BlockStore
from fedunlearn.federation.flower_strategy import WrappedStrategy
from fedunlearn.federation.local_grid import SERVER_NODE
from fedunlearn.federation.site import client_shapes
from fedunlearn.records.adapter import Tensors, hash_tensors
from fedunlearn.records.shape import ClientShape

from .recording import NUM_ROUNDS, Recorded
from .replay import learnt
from .rows import Row

TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class State:
    """The server's state after a round, in memory but for side-car blocks."""

    server: ServerState
    blocks: tuple[str, ...] = ()
    carried: Tensors = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """As a checkpoint names its adapter."""
        own = hash_tensors(self.server.adapter)
        return hashlib.sha256(" ".join((own, *self.blocks)).encode()).hexdigest() if self.blocks else own


@dataclass(frozen=True, eq=False)
class Direct:
    """Seven clients whose updates are handed to fedunlearn.aggregation.reduce, or to the Flower strategy, one round after another."""

    recorded: Recorded
    row: Row
    run: TrainRun
    store: BlockStore

    @property
    def scales(self) -> Mapping[str, float]:
        """The adapter's s by module name."""
        return scales_of(self.recorded.start.peft_config, self.recorded.start.tensors)

    @property
    def shapes(self) -> dict[int, ClientShape]:
        """Clients' own ranks, where they have some."""
        shapes = client_shapes(self.run, self.recorded.start.peft_config)
        return dict(enumerate(shapes)) if self.run.ranks_differ else {}

    def hashes(self, clients: tuple[int, ...], idle: int | None = None) -> tuple[str, ...]:
        """Gives the adapter's hash after each round. clients: whose updates count; idle: one of them that learnt nothing.

        Raises AssertionError where the first round is not what dense float64 says.
        """
        foreign = None
        if isinstance(self.run.strategy, FlowerStrategy):
            foreign = WrappedStrategy.build(self.run.strategy, self.run.trainer.args.seed)
        state, hashes = State(ServerState(adapter=self.recorded.start.tensors)), []
        for number in range(1, NUM_ROUNDS + 1):
            cohort = self._cohort(state, number, clients, idle)
            after = self._reduced(state, cohort) if foreign is None else self._by_flower(foreign, state, cohort)
            if number == 1 and self.row.dense is not None:
                _check_dense(self.row.dense, cohort, after, self.store)
            state = after
            hashes.append(state.hash)
        return tuple(hashes)

    def _cohort(self, state: State, number: int, clients: tuple[int, ...], idle: int | None) -> Cohort:
        adapter, shapes = state.server.adapter, self.shapes
        sent = {k: cut_to(shapes[k], adapter, self.scales) if shapes else adapter for k in clients}
        back = {k: sent[k] if k == idle else learnt(sent[k], self.recorded.deltas[k]) for k in clients}
        shares, _ = cap_shares(self._shares(back, sent, number), self.run.gate.max_client_share or 1.0)
        return Cohort(
            adapter=adapter,
            scales=self.scales,
            weights=shares,
            read=lambda client, name: back[client][name],
            round=number,
            seed=self.run.trainer.args.seed,
            trained=trained_in(self.run.aggregation.mask, number),
            shapes=shapes,
            carried=state.carried,
            blocks=lambda module: self.store.of_module(state.blocks, module),
            block_rank=self.store.rank_of(state.blocks, modules_of(adapter)),
        )

    def _shares(self, back: Mapping[int, Tensors], sent: Mapping[int, Tensors], number: int) -> dict[int, float]:
        kind = self.run.aggregation.weights
        raw: dict[int, float] = {}
        for client, tensors in back.items():
            scales = dict.fromkeys(self.scales, self.shapes[client].scale) if self.shapes else self.scales
            products = [scales[m.name] * tensors[m.b].double() @ tensors[m.a].double() for m in modules_of(tensors)]
            norm = float(sum(p.square().sum() for p in products)) ** 0.5
            said = self.recorded.said[client]
            raw[client] = {"owned": said.num_examples, "trained": said.num_trained, "uniform": 1, "product_norm": norm}[
                kind
            ]
        return {client: weight / sum(raw.values()) for client, weight in raw.items()}

    def _reduced(self, state: State, cohort: Cohort) -> State:
        chosen, strategy = self.run.aggregation, self.run.strategy
        assert isinstance(strategy, ServerOptimizer)
        choices = Choices(
            reducer=reducer_of(chosen.reducer, chosen.trim),
            gauge=gauge_of(chosen.gauge, chosen.softness),
            robust=self.run.robust,
            sidecar=chosen.residual == "sidecar",
            feedback=chosen.residual == "feedback",
            sidecar_rank=chosen.sidecar_rank,
        )
        reduced = reduce_round(choices, cohort)
        moved = {name: state.server.adapter[name] for name in reduced.mean}
        server = strategy.step(replace(state.server, adapter=moved), reduced.mean)
        blocks = state.blocks
        if reduced.block:
            blocks = (*(() if reduced.replaces else blocks), self.store.keep(reduced.block))
        whole = replace(server, adapter={**state.server.adapter, **server.adapter})
        return State(whole, blocks, reduced.carried)

    def _by_flower(self, strategy: WrappedStrategy, state: State, cohort: Cohort) -> State:
        nodes = {client: SERVER_NODE + 1 + client for client in cohort.weights}
        strategy.configure(cohort.round, cohort.adapter, nodes)
        losses = {client: self.recorded.said[client].loss for client in cohort.weights}
        result = strategy.aggregate(cohort.round, cohort.weights, nodes, cohort.read, cohort.adapter, losses)
        adapter = {name: result[name].float() for name in cohort.adapter}
        return State(ServerState(adapter=adapter, round=cohort.round))


def _check_dense(kind: str, cohort: Cohort, after: State, store: BlockStore) -> None:
    """Entry by entry for means of factors; else as whole matrices [d_out, d_in]."""
    if kind in _OF_ENTRIES:
        for name, got in after.server.adapter.items():
            want = _OF_ENTRIES[kind](cohort, name) if cohort.trained.covers(name) else cohort.adapter[name].double()
            _assert_close(name, got.double(), want)
        return
    for module in modules_of(cohort.adapter):
        adapter, scale = after.server.adapter, cohort.scales[module.name]
        got = scale * adapter[module.b].double() @ adapter[module.a].double()
        block = store.of_module(after.blocks, module)
        got = got if block is None else got + block.dense()
        parts = [p * s * b @ a for p, s, b, a in _products(cohort, module.a, module.b, scale)]
        want = torch.stack(parts).sum(0)
        if kind == "best rank":
            u, s, vt = torch.linalg.svd(want, full_matrices=False)
            rank = adapter[module.a].shape[0]
            want = u[:, :rank] * s[:rank] @ vt[:rank]
        _assert_close(module.name, got, want)


def _products(cohort: Cohort, a: str, b: str, scale: float) -> list[tuple[float, float, torch.Tensor, torch.Tensor]]:
    return [
        (
            weight,
            cohort.shapes[k].scale if cohort.shapes else scale,
            (cohort.read(k, b) if cohort.trained.covers(b) else cohort.adapter[b]).double(),
            (cohort.read(k, a) if cohort.trained.covers(a) else cohort.adapter[a]).double(),
        )
        for k, weight in cohort.weights.items()
    ]


def _mean(cohort: Cohort, name: str) -> torch.Tensor:
    """Padded with zeros where ranks differ; a factor of another scale s_k counts as one of scale s."""
    want = torch.zeros_like(cohort.adapter[name], dtype=torch.float64)
    own = next(iter(cohort.scales.values()))
    for client, weight in cohort.weights.items():
        tensor = cohort.read(client, name).double()
        share = (cohort.shapes[client].scale / own) ** 0.5 if cohort.shapes else 1.0
        want[: tensor.shape[0], : tensor.shape[1]] += weight * share * tensor
    return want


def _sorted(cohort: Cohort, name: str) -> torch.Tensor:
    return torch.stack([cohort.read(client, name).double() for client in cohort.weights]).sort(dim=0).values


def _trimmed(cohort: Cohort, name: str) -> torch.Tensor:
    """One in five left out at each end: one of six or seven."""
    return _sorted(cohort, name)[1:-1].mean(0)


def _median(cohort: Cohort, name: str) -> torch.Tensor:
    values = _sorted(cohort, name)
    half = len(values) // 2
    return values[half] if len(values) % 2 else values[half - 1 : half + 1].mean(0)


_OF_ENTRIES: Mapping[str, Callable[[Cohort, str], torch.Tensor]] = {
    "factors": _mean,
    "trimmed": _trimmed,
    "median": _median,
}


def _assert_close(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    apart = float((got - want).norm() / want.norm().clamp_min(1e-30))
    assert apart < TOLERANCE, f"{name} is {apart:.1e} off dense float64"
