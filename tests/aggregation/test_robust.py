"""Robust weights from a Gram matrix: by hand in one and two dimensions, against a plain minimiser, and under attack."""

import numpy as np
import pytest
import torch
from helpers_reduce import laws, seeds
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from fedunlearn.aggregation.robust.base import Weighting, squared_distances
from fedunlearn.aggregation.robust.geometric_median import GeometricMedian
from fedunlearn.aggregation.robust.krum import Krum, MultiKrum, ranked
from fedunlearn.aggregation.robust.norm_clipping import NormClipping
from fedunlearn.aggregation.robust.off import Off
from fedunlearn.errors import UserError


def points(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def line(*values):
    return points(*[[float(v)] for v in values])


def uniform(count):
    return (1 / count,) * count


def place(weighting, at):
    """The point that the weights say; the old global adapter is the origin."""
    return torch.tensor(weighting.clients, dtype=torch.float64) @ at


def test_off_gives_the_weights_back_and_asks_for_nothing():
    assert Off().reweigh((0.25, 0.75), torch.zeros(0, 0)) == Weighting((0.25, 0.75), 0.0)
    assert not Off().reads_gram
    assert Off().min_updates == 1


@pytest.mark.parametrize("member", [NormClipping(), Krum(), MultiKrum(), GeometricMedian()])
def test_the_others_read_the_gram_matrix(member):
    assert member.reads_gram


def test_distances_by_hand():
    """(0, 0), (3, 4), (3, 0): 25, 9, 16."""
    x = points([0, 0], [3, 4], [3, 0])
    assert squared_distances(x @ x.T).tolist() == [[0, 25, 9], [25, 0, 16], [9, 16, 0]]


def test_clipping_by_hand():
    """Norms 5, 10, 1 and a bound of 4: c = 4/5, 4/10, 1. Weights .5, .3, .2 give .4, .12, .2; .1 + .18 = .28 is left for the old."""
    x = points([3, 4], [0, 10], [1, 0])
    weighting = NormClipping(max_norm=4.0).reweigh((0.5, 0.3, 0.2), x @ x.T)
    assert weighting.clients == pytest.approx((0.4, 0.12, 0.2), abs=1e-15)
    assert weighting.old == pytest.approx(0.28, abs=1e-15)


@pytest.mark.parametrize(
    ("norms", "clipped"), [((1, 2, 9), (1, 1, 2 / 9)), ((1, 2, 4, 9), (1, 1, 3 / 4, 3 / 9)), ((5,), (1,))]
)
def test_clipping_at_the_median_by_hand(norms, clipped):
    """Of 1, 2, 9 it is 2; of 1, 2, 4, 9 it is (2 + 4) / 2 = 3; of one update its own norm."""
    x = line(*norms)
    weighting = NormClipping().reweigh(uniform(len(norms)), x @ x.T)
    assert [w * len(norms) for w in weighting.clients] == pytest.approx(list(clipped), abs=1e-14)
    assert weighting.old == pytest.approx(1 - sum(clipped) / len(norms), abs=1e-14)


@laws
@given(seed=seeds, count=st.integers(1, 7), bound=st.floats(1e-3, 1e3))
def test_clipped_updates_have_at_most_the_bound_and_the_others_stay(seed, count, bound):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weighting = NormClipping(max_norm=bound).reweigh(uniform(count), x @ x.T)
    for weight, norm in zip(weighting.clients, x.norm(dim=1).tolist(), strict=True):
        assert weight * count * norm == pytest.approx(min(norm, bound), rel=1e-12)
    assert sum(weighting.clients) + weighting.old == pytest.approx(1.0, abs=1e-14)


def test_clipping_updates_of_zero():
    assert NormClipping().reweigh(uniform(3), torch.zeros(3, 3).double()) == Weighting(uniform(3), 0.0)


def test_krum_by_hand():
    """Points 0, 1, 3, 4, 20 on a line, f = 1: the K - f - 2 = 2 nearest count. Scores:
    0: 1 + 9 = 10; 1: 1 + 4 = 5; 3: 1 + 4 = 5; 4: 1 + 9 = 10; 20: 256 + 289 = 545. 1 and 3 tie, the lower id wins.
    """
    x = line(0, 1, 3, 4, 20)
    assert ranked(x @ x.T, 1) == [1, 2, 0, 3, 4]
    assert Krum(num_malicious=1).reweigh(uniform(5), x @ x.T) == Weighting((0.0, 1.0, 0.0, 0.0, 0.0))


def test_krum_in_the_plane_by_hand():
    """(0, 0), (2, 0), (0, 1), (1, 1), (9, 9), f = 1, two neighbours each. (0, 0): 1 + 2 = 3; (2, 0): 2 + 4 = 6; (0, 1): 1 + 1 = 2;
    (1, 1): 1 + 2 = 3; (9, 9): 128 + 130. So (0, 1), then (0, 0) before (1, 1) by its id.
    """
    x = points([0, 0], [2, 0], [0, 1], [1, 1], [9, 9])
    assert ranked(x @ x.T, 1) == [2, 0, 3, 1, 4]


def test_krum_without_malicious_clients():
    """f = 0, K = 3: one neighbour each: 0: 1, 1: 1, 5: 16."""
    x = line(0, 1, 5)
    assert Krum(num_malicious=0).reweigh(uniform(3), x @ x.T).clients == (1.0, 0.0, 0.0)


def test_multi_krum_by_hand():
    """0, 1, 3, 4, 20 rank as 1, 3, 0, 4, 20. K - f - 2 = 2: points 1 and 3, of weights .1 and .3: 1/4 and 3/4. Three selected:
    with point 0 of weight .2: .1/.6, .3/.6, .2/.6.
    """
    x, weights = line(0, 1, 3, 4, 20), (0.2, 0.1, 0.3, 0.3, 0.1)
    assert MultiKrum().reweigh(weights, x @ x.T).clients == pytest.approx((0, 0.25, 0.75, 0, 0), abs=1e-15)
    three = MultiKrum(num_selected=3).reweigh(weights, x @ x.T)
    assert three.clients == pytest.approx((1 / 3, 1 / 6, 1 / 2, 0, 0), abs=1e-15)
    assert three.old == 0.0


def test_multi_krum_of_one_is_krum():
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert MultiKrum(num_selected=1).reweigh(uniform(6), x @ x.T) == Krum().reweigh(uniform(6), x @ x.T)


def test_krum_wants_enough_updates():
    assert (Krum(num_malicious=2).min_updates, MultiKrum(num_malicious=1).min_updates) == (7, 5)
    assert MultiKrum(num_malicious=1, num_selected=9).min_updates == 9
    with pytest.raises(ValueError, match="Krum wants at least 7 updates, got 6"):
        Krum(num_malicious=2).reweigh(uniform(6), torch.eye(6).double())


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Krum(num_malicious=-1), r"robust\.num_malicious=-1 must not be negative"),
        (lambda: MultiKrum(num_malicious=-2), r"robust\.num_malicious=-2 must not be negative"),
        (lambda: MultiKrum(num_selected=0), r"robust\.num_selected=0 must be at least 1, or null"),
        (lambda: NormClipping(max_norm=0.0), r"robust\.max_norm=0\.0 must be above 0, at most 1e6, or null"),
        (lambda: NormClipping(max_norm=float("nan")), r"robust\.max_norm=nan must be above 0, at most 1e6, or null"),
        (lambda: GeometricMedian(max_iterations=0), r"robust\.max_iterations=0 must lie between 1 and 1e6"),
        (lambda: GeometricMedian(tolerance=0.0), r"robust\.tolerance=0\.0 between 0 and 1"),
    ],
)
def test_parameters_that_mean_nothing_are_refused(build, said):
    with pytest.raises(UserError, match=said):
        build()


# The smoothing holds distances at a millionth of the median norm, so a median that lies on a point is found to about that.
SMOOTHED = 1e-5


@pytest.mark.parametrize(
    ("values", "weights", "median"),
    [
        ((1, 2, 10), uniform(3), 2),
        ((1, 2, 3, 4, 100), uniform(5), 3),
        ((1, 2, 10), (0.2, 0.2, 0.6), 10),
        ((5, 5, 5, 9), uniform(4), 5),
    ],
)
def test_the_geometric_median_of_points_on_a_line_is_their_weighted_median(values, weights, median):
    """1, 2, 10: 2. Five: the third. 10 with more than half the weight: 10. Three of four at 5: 5."""
    x = line(*values)
    weighting = GeometricMedian().reweigh(weights, x @ x.T)
    assert place(weighting, x).item() == pytest.approx(median, abs=SMOOTHED * max(values))
    assert sum(weighting.clients) == pytest.approx(1.0, abs=1e-12)
    assert weighting.old == 0.0


def test_the_geometric_median_of_a_triangle_by_hand():
    """Three corners around (4, 0) at distance 1: equilateral, so its centre, each a third. A corner of half the weight pulls harder than
    the other two together, whose pulls .2 and .3 point apart: the median is that corner.
    """
    h = 3**0.5 / 2
    x = points([5, 0], [3.5, h], [3.5, -h])
    even = GeometricMedian().reweigh(uniform(3), x @ x.T)
    assert even.clients == pytest.approx(uniform(3), abs=1e-9)
    heavy = GeometricMedian().reweigh((0.2, 0.5, 0.3), x @ x.T)
    assert place(heavy, x).tolist() == pytest.approx([3.5, h], abs=SMOOTHED * 5)


def test_the_geometric_median_of_a_convex_quadrilateral_is_where_its_diagonals_cross():
    """(0, 0), (4, 0), (4, 2), (0, 2): (2, 1); and of the kite (0, 3), (1, 0), (0, -1), (-2, 0): the origin."""
    box = points([0, 0], [4, 0], [4, 2], [0, 2])
    assert place(GeometricMedian().reweigh(uniform(4), box @ box.T), box).tolist() == pytest.approx([2, 1], abs=1e-8)
    kite = points([0, 3], [1, 0], [0, -1], [-2, 0])
    assert place(GeometricMedian().reweigh(uniform(4), kite @ kite.T), kite).tolist() == pytest.approx([0, 0], abs=1e-8)


def spread(x, weights, at):
    return float((torch.tensor(weights, dtype=torch.float64) * (x - at).norm(dim=1)).sum())


@laws
@given(seed=seeds, count=st.integers(1, 8), dims=st.integers(1, 5))
def test_weiszfeld_finds_what_a_plain_minimiser_finds(seed, count, dims):
    """The sum of distances, ours against scipy's best of three starts. At a minimum it is flat: 1e-6 smoothing costs at most that much."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, dims, generator=generator, dtype=torch.float64)
    raw = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    weights = tuple((raw / raw.sum()).tolist())
    ours = spread(x, weights, place(GeometricMedian().reweigh(weights, x @ x.T), x))

    def cost(at):
        return spread(x, weights, torch.tensor(at))

    starts = [x.mean(0).numpy(), *x.numpy()[:2]]
    theirs = min(
        minimize(cost, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000}).fun
        for start in starts
    )
    at_points = min(spread(x, weights, point) for point in x)
    assert ours <= min(theirs, at_points) + 3e-6


def test_no_update_at_all_keeps_the_weights():
    assert GeometricMedian().reweigh((0.3, 0.7), torch.zeros(2, 2).double()) == Weighting((0.3, 0.7))


@pytest.mark.parametrize("size", [1e2, 1e6, 1e9, 1e12])
@pytest.mark.parametrize(
    "member", [NormClipping(), Krum(), MultiKrum(), GeometricMedian()], ids=lambda member: type(member).__name__
)
def test_one_attacker_hardly_moves_the_result(member, size):
    """Six honest updates of about (1, 0, 0), one of any size across them. The mean goes size / 7 its way; each of these stays within
    1.1: clipping lets a median norm through, 1/7 of about 1.1; the others a fraction of the honest ones' spread of 0.1.
    """
    generator = torch.Generator().manual_seed(3)
    honest = points([1, 0, 0]) + 0.1 * torch.randn(6, 3, generator=generator, dtype=torch.float64)
    x = torch.cat([honest, points([0, size, 0])])
    weighting = member.reweigh(uniform(7), x @ x.T)
    bound = 0.2 if not isinstance(member, NormClipping) else 0.25
    assert abs(float(place(weighting, x)[1])) < bound
    assert weighting.clients[-1] * size < 1.0
    assert float((place(Off().reweigh(uniform(7), x @ x.T), x))[1]) > 0.9 * size / 7


def test_three_attackers_in_agreement_are_more_than_krum_was_told_of():
    """f = 1 of 7, three attackers at one point: their distances are 0, the fourth neighbour is honest. With f = 1 four neighbours count,
    so agreement does not win: scores (honest, spread 0.1) below 4 * 0.1; attackers 2 * 100^2.
    """
    generator = torch.Generator().manual_seed(3)
    honest = points([1, 0]) + 0.1 * torch.randn(4, 2, generator=generator, dtype=torch.float64)
    x = torch.cat([honest, points([0, 100], [0, 100], [0, 100])])
    assert max(Krum().reweigh(uniform(7), x @ x.T).clients[4:]) == 0.0


@laws
@given(seed=seeds, count=st.integers(5, 8))
def test_weights_follow_their_clients(seed, count):
    """Turning the order of the updates turns the weights; scores and norms have no ties here."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    raw = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    weights = raw / raw.sum()
    order = torch.randperm(count, generator=generator)
    for member in (NormClipping(), Krum(), MultiKrum(), GeometricMedian()):
        plain = torch.tensor(member.reweigh(tuple(weights.tolist()), x @ x.T).clients)
        moved = torch.tensor(member.reweigh(tuple(weights[order].tolist()), x[order] @ x[order].T).clients)
        np.testing.assert_allclose(moved.numpy(), plain[order].numpy(), rtol=0, atol=1e-7)  # Weiszfeld ends at 1e-10


def test_multi_krum_counts_equally_where_the_chosen_ones_have_no_weight():
    """Six updates at the origin, one far away that has all the weight (as by product norm): the four chosen share alike."""
    points = torch.zeros(7, 1, dtype=torch.float64)
    points[6] = 10.0
    found = MultiKrum(num_malicious=1).reweigh((0.0,) * 6 + (1.0,), points @ points.T)
    assert found.clients == (0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0)
