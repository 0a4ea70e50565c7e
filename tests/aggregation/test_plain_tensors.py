"""Tensors that are no factors: averaged entry by entry, beside whatever is done to the pairs."""

from dataclasses import replace

import pytest
import torch
from helpers_reduce import FLOAT64, made
from torch.utils._python_dispatch import TorchDispatchMode

from fedunlearn.aggregation import pieces
from fedunlearn.aggregation.factors import cut_to, plain_of
from fedunlearn.aggregation.gauges.base import Gauge
from fedunlearn.aggregation.gauges.svd import Balanced
from fedunlearn.aggregation.reduce import Choices, reduce_round, update_norms
from fedunlearn.aggregation.reducers.best_rank import BestRank
from fedunlearn.aggregation.reducers.factor_mean import FactorMean
from fedunlearn.aggregation.reducers.trimmed_mean import TrimmedMean
from fedunlearn.aggregation.robust.geometric_median import GeometricMedian
from fedunlearn.aggregation.robust.krum import Krum
from fedunlearn.aggregation.robust.norm_clipping import NormClipping
from fedunlearn.aggregation.robust.off import Off
from fedunlearn.records.rounds import Trained
from fedunlearn.records.shape import ClientShape

M, H = "base_model.model.layers.0.q.lora_magnitude_vector", "base_model.model.head.weight"
OFF = Choices(reducer=FactorMean(), gauge=Gauge(), robust=Off())
SHAPES = {M: (28,), H: (7, 5)}


def with_plain(case, seed=5):
    """The same round with a vector and a matrix that are no factors; every client moved them."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}

    clients = {k: {**tensors, **draw()} for k, tensors in case.clients.items()}
    return replace(case, adapter={**case.adapter, **draw()}, clients=clients)


@pytest.mark.parametrize("trained", list(Trained))
def test_their_mean_is_the_weighted_mean_whatever_the_mask(trained):
    case = with_plain(made(3, trained=trained))
    mean = reduce_round(OFF, case.cohort()).mean
    for name in SHAPES:
        wanted = sum(case.weights[k] * case.clients[k][name] for k in case.clients)
        assert torch.allclose(mean[name], wanted, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize(
    "choices", [OFF, replace(OFF, reducer=BestRank(), gauge=Balanced())], ids=["factors", "product"]
)
def test_the_pairs_are_what_they_are_without_them(choices):
    case = made(4)
    alone, beside = reduce_round(choices, case.cohort()), reduce_round(choices, with_plain(case).cohort())
    assert set(beside.mean) == set(alone.mean) | set(SHAPES)
    assert all(torch.equal(tensor, beside.mean[name]) for name, tensor in alone.mean.items())
    assert (beside.error, beside.norm) == (alone.error, alone.norm)


def test_a_robust_weight_sees_them_and_leaves_their_share_to_the_old_one():
    """Who moved nothing but a plain tensor, and far, is clipped to it: c = max_norm / norm, and 1 - c of its weight stays with the old."""
    case = with_plain(made(2, spread=0.0))
    still, far = sorted(case.clients)
    clients = {k: {**case.adapter} for k in case.clients}
    clients[far][M] = case.adapter[M] + 3.0 * torch.nn.functional.normalize(torch.ones(28, dtype=torch.float64), dim=0)
    case = replace(case, clients=clients, weights={still: 0.5, far: 0.5})
    reduced = reduce_round(replace(OFF, robust=NormClipping(max_norm=1.0)), case.cohort())
    assert reduced.weights == pytest.approx({still: 0.5, far: 0.5 / 3})
    moved = reduced.mean[M] - case.adapter[M]
    assert float(moved.norm()) == pytest.approx(0.5, abs=1e-9)
    assert torch.allclose(reduced.mean[H], case.adapter[H], rtol=0, atol=FLOAT64)


class _Largest(TorchDispatchMode):
    """Remembers how many entries the largest tensor has that an operation made."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        made = found if isinstance(found, tuple | list) else [found]
        self.entries = max(
            [self.entries, *(t.numel() for t in made if isinstance(t, torch.Tensor) and not func.is_view)]
        )
        return found


@pytest.mark.parametrize(
    "choices",
    [replace(OFF, robust=Krum()), replace(OFF, robust=GeometricMedian()), replace(OFF, reducer=TrimmedMean(0.3))],
)
def test_a_large_one_is_taken_piece_by_piece(monkeypatch, choices):
    """A saved head of every client at once would be more than the server has. What is made is no larger than one head, whoever takes part."""
    case, heads = with_plain(made(5)), 20_000
    draw = torch.Generator().manual_seed(1)
    clients = {k: {**t, H: torch.randn(200, 100, generator=draw)} for k, t in case.clients.items()}
    case = replace(case, clients=clients, adapter={**case.adapter, H: torch.randn(200, 100, generator=draw)})
    with _Largest() as at_once:
        whole = reduce_round(choices, case.cohort())
    monkeypatch.setattr(pieces, "ENTRIES", 1200)
    with _Largest() as by_pieces:
        found = reduce_round(choices, case.cohort())
    assert (at_once.entries, by_pieces.entries) == (5 * heads, heads)
    assert found.weights == pytest.approx(whole.weights, abs=1e-12)
    assert all(torch.allclose(found.mean[name], tensor, rtol=0, atol=FLOAT64) for name, tensor in whole.mean.items())
    if isinstance(choices.reducer, TrimmedMean):
        assert torch.equal(found.mean[H], whole.mean[H])


def test_pieces_are_the_entries_in_order(monkeypatch):
    monkeypatch.setattr(pieces, "ENTRIES", 9)
    one, two = torch.arange(14.0).reshape(2, 7), torch.arange(14).reshape(7, 2).T
    got = list(pieces.in_pieces([one, two]))
    assert [len(part) for part, _ in got] == [4, 4, 4, 2]
    assert torch.equal(torch.cat([part for part, _ in got]), one.flatten())
    assert torch.equal(torch.cat([part for _, part in got]), two.flatten())
    (alone,) = pieces.in_pieces([torch.tensor(3.0)])
    assert alone[0].tolist() == [3.0]


def test_norms_count_them_by_their_difference():
    case = with_plain(made(1))
    client = next(iter(case.clients.values()))
    pairs = {name: tensor for name, tensor in case.adapter.items() if name not in SHAPES}
    alone = update_norms({n: client[n] for n in pairs}, pairs, case.scales)
    both = update_norms(client, case.adapter, case.scales)
    moved = sum(float((client[n] - case.adapter[n]).square().sum()) for n in SHAPES)
    size = sum(float(case.adapter[n].square().sum()) for n in SHAPES)
    assert both.update**2 == pytest.approx(alone.update**2 + moved)
    assert both.factors**2 == pytest.approx(alone.factors**2 + moved)
    assert both.start**2 == pytest.approx(alone.start**2 + size)
    assert (both.product, both.by_module) == (alone.product, alone.by_module)


def test_a_client_of_a_smaller_rank_gets_them_whole():
    case = with_plain(made(1, rank=3))
    sent = cut_to(ClientShape(rank=1, lora_alpha=2.0), case.adapter, case.scales)
    assert plain_of(sent) == tuple(sorted(SHAPES))
    assert all(torch.equal(sent[name], case.adapter[name]) for name in SHAPES)
