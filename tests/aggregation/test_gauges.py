"""Gauges: the product stays what it was; each one's own promise about the factors."""

import math

import numpy as np
import pytest
import torch
from helpers_reduce import FLOAT64, laws, rotation, seeds
from hypothesis import assume, given
from hypothesis import strategies as st

from fedunlearn.aggregation.factors import Factors
from fedunlearn.aggregation.gauges.base import Gauge, Moment
from fedunlearn.aggregation.gauges.procrustes import Procrustes, nearest_rotation
from fedunlearn.aggregation.gauges.reset import Reset
from fedunlearn.aggregation.gauges.svd import Balanced, Orthonormal
from fedunlearn.aggregation.reducers.base import ModuleCohort

BY_SVD = [Orthonormal(), Balanced()]


def moment(round=2, seed=0):
    return Moment(round=round, generator=torch.Generator().manual_seed(seed))


def draw(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product_of_rank(rank, own=4, d_out=20, d_in=15, seed=0):
    """B [d_out, own] and A [own, d_in] whose product has the given rank, no column of B zero by itself."""
    b = draw(d_out, rank, seed=seed) @ draw(rank, own, seed=seed + 1)
    return b, draw(own, d_in, seed=seed + 2)


def old_of(b, a):
    return Factors(b, a, 1.0)


def members(*clients, old):
    return ModuleCohort(old=old, clients=clients, weights=(1 / len(clients),) * len(clients))


def turned(b, a):
    """2-D factors turned by 90 degrees: B R, R^T A with R = [[0, -1], [1, 0]]."""
    r = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    return b @ r, r.T @ a


def test_as_is_changes_nothing():
    b, a = product_of_rank(3)
    cohort = members(old_of(b, a), old=old_of(b, a))
    assert Gauge().align(cohort, moment()) is cohort
    out = Gauge().refactor(b, a, old_of(b, a), moment())
    assert out[0] is b
    assert out[1] is a


def test_whose_entries_mean_the_same_in_the_next_round():
    gauges = [Gauge(), Procrustes(0.5), Orthonormal(), Balanced(), Reset()]
    assert [gauge.keeps_place for gauge in gauges] == [True, True, False, False, False]


def test_orthonormal_by_hand():
    """B A = [3; 4] [0 2] = 10 [.6; .8] [0 1]: B = U S = (6, 8), A = (0, 1)."""
    b, a = torch.tensor([[3.0], [4.0]]).double(), torch.tensor([[0.0, 2.0]]).double()
    new_b, new_a = Orthonormal().refactor(b, a, old_of(b, a), moment())
    torch.testing.assert_close(new_b, torch.tensor([[6.0], [8.0]]).double(), rtol=1e-14, atol=0)
    torch.testing.assert_close(new_a, torch.tensor([[0.0, 1.0]]).double(), rtol=1e-14, atol=0)


def test_balanced_by_hand():
    """B A = [3; 4] [0 5] = 25 [.6; .8] [0 1]: both carry sqrt 25 = 5: B = (3, 4), A = (0, 5)."""
    b, a = torch.tensor([[6.0], [8.0]]).double(), torch.tensor([[0.0, 2.5]]).double()
    new_b, new_a = Balanced().refactor(b, a, old_of(b, a), moment())
    torch.testing.assert_close(new_b, torch.tensor([[3.0], [4.0]]).double(), rtol=1e-14, atol=0)
    torch.testing.assert_close(new_a, torch.tensor([[0.0, 5.0]]).double(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("gauge", BY_SVD, ids=["orthonormal", "balanced"])
@laws
@given(seed=seeds, rank=st.integers(1, 4), tall=st.booleans())
def test_gauges_by_svd_keep_the_product_and_every_direction_alive(gauge, seed, rank, tall):
    """Both branches of the SVD (8 x 9: dense); where B's column is zero A's row has length 1 and stands orthogonal to the rest."""
    b, a = product_of_rank(rank, d_out=20 if tall else 8, d_in=15 if tall else 9, seed=seed)
    new_b, new_a = gauge.refactor(b, a, old_of(b, a), moment())
    assert float((new_b @ new_a - b @ a).norm() / (b @ a).norm()) < FLOAT64
    s = torch.linalg.svdvals(b @ a)
    assume(float(s[rank - 1] / s[0]) > 1e-6)
    lengths = new_a.norm(dim=1)
    # dead columns: zero, or rounding of the product's own norm
    assert float(new_b[:, rank:].norm()) < FLOAT64 * float(s[0])
    torch.testing.assert_close(lengths[rank:], torch.ones(4 - rank).double(), rtol=1e-10, atol=0)
    unit = new_a / lengths[:, None]
    torch.testing.assert_close(unit @ unit.T, torch.eye(4).double(), rtol=0, atol=1e-9)  # 1e-16 / 1e-6
    if isinstance(gauge, Balanced):
        torch.testing.assert_close(new_b.norm(dim=0)[:rank], lengths[:rank], rtol=1e-9, atol=0)
        torch.testing.assert_close(lengths[:rank] ** 2, s[:rank], rtol=1e-9, atol=0)
    else:
        torch.testing.assert_close(new_b.norm(dim=0)[:rank], s[:rank], rtol=1e-9, atol=0)
        torch.testing.assert_close(lengths, torch.ones(4).double(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("gauge", BY_SVD, ids=["orthonormal", "balanced"])
def test_a_direction_with_no_weight_stays_where_a_has_it(gauge):
    """B's last two columns are zero: A's rows, new and old, span the same four directions."""
    b, a = draw(20, 4), draw(4, 15, seed=1)
    b[:, 2:] = 0
    _, new_a = gauge.refactor(b, a, old_of(b, a), moment())
    basis, _ = torch.linalg.qr(a.T)
    torch.testing.assert_close(new_a @ basis @ basis.T, new_a, rtol=0, atol=FLOAT64)
    assert int(torch.linalg.matrix_rank(new_a)) == 4


@pytest.mark.parametrize("gauge", BY_SVD, ids=["orthonormal", "balanced"])
def test_a_product_of_zero_keeps_its_factors(gauge):
    b, a = torch.zeros(20, 4).double(), draw(4, 15)
    new_b, new_a = gauge.refactor(b, a, old_of(b, a), moment())
    assert torch.equal(new_b, b)
    assert torch.equal(new_a, a)


@pytest.mark.parametrize("gauge", BY_SVD, ids=["orthonormal", "balanced"])
def test_refactoring_twice_changes_nothing(gauge):
    b, a = product_of_rank(4)
    once = gauge.refactor(b, a, old_of(b, a), moment())
    twice = gauge.refactor(*once, old_of(*once), moment())
    for first, second in zip(once, twice, strict=True):
        torch.testing.assert_close(second, first, rtol=0, atol=1e-10)  # singular vectors: 1e-16 / gap


def test_reset_draws_a_anew_and_keeps_an_empty_b():
    b, a = torch.zeros(20, 4).double(), draw(4, 15)
    new_b, new_a = Reset().refactor(b, a, old_of(b, a), moment(seed=3))
    _, again = Reset().refactor(b, a, old_of(b, a), moment(seed=3))
    _, other = Reset().refactor(b, a, old_of(b, a), moment(seed=4))
    assert not new_b.any()
    assert torch.equal(new_a, again)
    assert not torch.equal(new_a, other)
    assert new_a.dtype == torch.float64
    assert 0 < float(new_a.abs().max()) <= 1 / math.sqrt(15)


def test_reset_gives_modules_of_one_round_different_factors():
    """One generator a round, drawn from module by module."""
    now, b, a = moment(), torch.zeros(20, 4).double(), draw(4, 15)
    assert not torch.equal(Reset().refactor(b, a, old_of(b, a), now)[1], Reset().refactor(b, a, old_of(b, a), now)[1])


@pytest.mark.parametrize("round", [2, 3])
def test_procrustes_turns_a_quarter_turn_back(round):
    """A client that differs from the global one by 90 degrees alone: softness 1 undoes it, by A in round 2 and by B in round 3;
    softness 0.5 goes half way, 45 degrees: (I + R) / 2 = [[.5, -.5], [.5, .5]], whose nearest rotation is that over sqrt(1/2).
    """
    b, a = draw(3, 2), draw(2, 3, seed=1)
    old = old_of(b, a)
    cohort = members(old_of(*turned(b, a)), old=old)
    back = Procrustes(1.0).align(cohort, moment(round)).clients[0]
    torch.testing.assert_close(back.b, b, rtol=0, atol=1e-14)
    torch.testing.assert_close(back.a, a, rtol=0, atol=1e-14)
    half = Procrustes(0.5).align(cohort, moment(round)).clients[0]
    c = math.sqrt(0.5)
    eighth = torch.tensor([[c, -c], [c, c]], dtype=torch.float64)
    torch.testing.assert_close(half.b, b @ eighth, rtol=0, atol=1e-14)
    torch.testing.assert_close(half.a, eighth.T @ a, rtol=0, atol=1e-14)
    none = Procrustes(0.0).align(cohort, moment(round)).clients[0]
    torch.testing.assert_close(none.b, cohort.clients[0].b, rtol=0, atol=1e-14)


def test_procrustes_turns_nothing_in_round_1():
    b, a = draw(3, 2), draw(2, 3, seed=1)
    cohort = members(old_of(*turned(b, a)), old=old_of(b, a))
    assert Procrustes(1.0).align(cohort, moment(1)) is cohort


@laws
@given(seed=seeds, softness=st.floats(0, 1), round=st.integers(2, 5))
def test_procrustes_keeps_every_client_s_product(seed, softness, round):
    clients = [Factors(draw(9, 3, seed=seed + k), draw(3, 7, seed=seed + k + 50), 2.0) for k in range(3)]
    cohort = members(*clients, old=Factors(draw(9, 3, seed=seed + 99), draw(3, 7, seed=seed + 98), 2.0))
    for before, after in zip(clients, Procrustes(softness).align(cohort, moment(round)).clients, strict=True):
        torch.testing.assert_close(after.b @ after.a, before.b @ before.a, rtol=0, atol=FLOAT64)
        assert after.scale == 2.0


@laws
@given(seed=seeds, by_a=st.booleans())
def test_full_procrustes_is_the_best_rotation(seed, by_a):
    """None of 200 rotations drawn brings the factor nearer, and the one taken is no farther than no rotation at all."""
    clients = Factors(draw(9, 3, seed=seed), draw(3, 7, seed=seed + 50), 1.0)
    old = Factors(draw(9, 3, seed=seed + 99), draw(3, 7, seed=seed + 98), 1.0)
    ours = Procrustes(1.0).align(members(clients, old=old), moment(2 if by_a else 3)).clients[0]
    generator = torch.Generator().manual_seed(seed)
    turns = [torch.eye(3).double(), *(rotation(3, generator) for _ in range(200))]

    def distance(turn):
        return float((turn.T @ clients.a - old.a).norm() if by_a else (clients.b @ turn - old.b).norm())

    taken = float((ours.a - old.a).norm() if by_a else (ours.b - old.b).norm())
    assert taken <= min(map(distance, turns)) + 1e-12


@laws
@given(seed=seeds, size=st.integers(1, 5))
def test_the_nearest_rotation_is_one(seed, size):
    turn = nearest_rotation(draw(size, size, seed=seed))
    torch.testing.assert_close(turn @ turn.T, torch.eye(size).double(), rtol=0, atol=FLOAT64)
    assert float(torch.linalg.det(turn)) == pytest.approx(1.0, abs=1e-12)


def test_the_nearest_rotation_to_a_reflection_gives_up_the_smallest_direction():
    """diag(3, -1): of +-diag the nearest without a reflection is I (distance 2), not -I (4)."""
    turn = nearest_rotation(torch.diag(torch.tensor([3.0, -1.0])).double())
    np.testing.assert_allclose(turn.numpy(), np.eye(2), atol=1e-15)


def test_the_nearest_rotation_to_zero_is_still_a_rotation():
    turn = nearest_rotation(torch.zeros(3, 3).double())
    torch.testing.assert_close(turn @ turn.T, torch.eye(3).double(), rtol=0, atol=1e-15)
    assert float(torch.linalg.det(turn)) == pytest.approx(1.0, abs=1e-15)
