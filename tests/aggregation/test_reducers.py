"""Each reducer on one module: by hand, and against a dense float64 way."""

import numpy as np
import pytest
import torch
from helpers_reduce import FLOAT64, best, gap, laws, rotation, seeds
from hypothesis import assume, given
from hypothesis import strategies as st

from fedunlearn.aggregation.factors import Factors
from fedunlearn.aggregation.product import LowRank
from fedunlearn.aggregation.reducers.base import ModuleCohort, mean_of
from fedunlearn.aggregation.reducers.best_rank import BestRank, completed
from fedunlearn.aggregation.reducers.factor_mean import FactorMean, PaddedFactorMean
from fedunlearn.aggregation.reducers.stack import Stack
from fedunlearn.aggregation.reducers.trimmed_mean import TrimmedMean

ALL = [FactorMean(), PaddedFactorMean(), BestRank(), Stack(), TrimmedMean(0.3)]


def column(*values):
    return torch.tensor([[float(v)] for v in values], dtype=torch.float64)


def row(*values):
    return torch.tensor([[float(v) for v in values]], dtype=torch.float64)


def random_factors(rank, scale, seed, d_out=30, d_in=20):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return Factors(b, torch.randn(rank, d_in, generator=generator, dtype=torch.float64), scale)


def whole(factors):
    return factors.scale * factors.b @ factors.a


def cohort(num_clients=3, seed=0, ranks=None, **changes):
    """Global rank 4 and scale 1.5; clients of that, or of `ranks` with scales of their own."""
    clients = tuple(
        random_factors(ranks[k] if ranks else 4, 0.5 + k if ranks else 1.5, 100 * seed + k) for k in range(num_clients)
    )
    given = {"weights": tuple((k + 1) / sum(range(1, num_clients + 1)) for k in range(num_clients))} | changes
    return ModuleCohort(old=random_factors(4, 1.5, 7777 + seed), clients=clients, **given)


def test_the_exact_product_by_hand():
    """Scales 2 and 1, weights 1/4 and 1/2, 1/4 left for the old (scale 4), 1 carried: 2 * 3/4 + 5/2 + 4 * 6/4 + 10 = 20."""
    members = ModuleCohort(
        old=Factors(column(2), row(3), 4.0),
        clients=(Factors(column(1), row(3), 2.0), Factors(column(5), row(1), 1.0)),
        weights=(0.25, 0.5),
        old_weight=0.25,
        carried=LowRank(column(2), row(5)),
    )
    assert members.exact().dense().tolist() == [[20.0]]


@laws
@given(seed=seeds, old_weight=st.sampled_from([0.0, 0.3]), ranks=st.sampled_from([None, (1, 4, 2)]))
def test_the_exact_product_is_the_dense_one(seed, old_weight, ranks):
    members = cohort(seed=seed, old_weight=old_weight, ranks=ranks)
    wanted = sum(w * whole(client) for w, client in zip(members.weights, members.clients, strict=True))
    torch.testing.assert_close(
        members.exact().dense(), wanted + old_weight * whole(members.old), rtol=0, atol=FLOAT64 * 10
    )


def test_the_mean_of_factors_by_hand():
    """Weights 1/4, 3/4: B = 1/4 + 3 * 3/4 = 2.5, A = 10/4 + 30 * 3/4 = 25; with 1/2 for the old (2, 4): halves of those sums and halves of these."""
    clients = (Factors(column(1), row(10), 1.0), Factors(column(3), row(30), 1.0))
    old = Factors(column(2), row(4), 1.0)
    b, a = FactorMean().reduce(ModuleCohort(old=old, clients=clients, weights=(0.25, 0.75)))
    assert (b.item(), a.item()) == (2.5, 25.0)
    b, a = FactorMean().reduce(ModuleCohort(old=old, clients=clients, weights=(0.125, 0.375), old_weight=0.5))
    assert (b.item(), a.item()) == (2.25, 14.5)


def test_the_padded_mean_by_hand():
    """s = 1. A client of rank 1, s_k = 4, (3, 5): padded (6, 0), (10, 0). One of rank 2, s_k = 1: (1, 2), (7, 8). Halves: B (3.5, 1), A (8.5, 4)."""
    old = Factors(row(0, 0), column(0, 0), 1.0)
    clients = (Factors(column(3), row(5), 4.0), Factors(row(1, 2), column(7, 8), 1.0))
    b, a = PaddedFactorMean().reduce(ModuleCohort(old=old, clients=clients, weights=(0.5, 0.5)))
    assert b.tolist() == [[3.5, 1.0]]
    assert a.tolist() == [[8.5], [4.0]]


@laws
@given(seed=seeds, ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), old_weight=st.sampled_from([0.0, 0.25]))
def test_the_padded_mean_is_the_one_padded_in_numpy(seed, ranks, old_weight):
    members = cohort(len(ranks), seed=seed, ranks=ranks, old_weight=old_weight)
    b, a = old_weight * members.old.b.numpy(), old_weight * members.old.a.numpy()
    for weight, client in zip(members.weights, members.clients, strict=True):
        root = (client.scale / members.old.scale) ** 0.5
        b = b + weight * np.pad(root * client.b.numpy(), ((0, 0), (0, 4 - client.rank)))
        a = a + weight * np.pad(root * client.a.numpy(), ((0, 4 - client.rank), (0, 0)))
    ours = PaddedFactorMean().reduce(members)
    np.testing.assert_allclose(ours[0].numpy(), b, rtol=0, atol=FLOAT64)
    np.testing.assert_allclose(ours[1].numpy(), a, rtol=0, atol=FLOAT64)


def test_equal_shapes_pad_to_the_plain_mean_bit_by_bit():
    members = cohort()
    for plain, padded in zip(FactorMean().reduce(members), PaddedFactorMean().reduce(members), strict=True):
        assert torch.equal(plain, padded)


def test_the_best_rank_by_hand():
    """Clients diag(4, 0) and diag(0, 2) at 1/2: exact diag(2, 1); rank 1 keeps diag(2, 0), with scale 4: B = 2/4, A = 1."""
    old = Factors(column(1, 1), row(1, 0.5), 4.0)
    clients = (Factors(column(4, 0), row(1, 0), 1.0), Factors(column(0, 1), row(0, 2), 1.0))
    b, a = BestRank().reduce(ModuleCohort(old=old, clients=clients, weights=(0.5, 0.5)))
    torch.testing.assert_close(b, column(0.5, 0), rtol=0, atol=1e-15)
    torch.testing.assert_close(a, row(1, 0), rtol=0, atol=1e-15)


@laws
@given(
    seed=seeds,
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    old_weight=st.sampled_from([0.0, 0.25]),
    carry=st.booleans(),
)
def test_the_best_rank_is_eckart_and_young_s(seed, ranks, old_weight, carry):
    """Against the dense SVD, old global and error feedback included; its own error is the root of the sum of the squares of what is cut."""
    extra = random_factors(3, 1.0, seed + 5)
    carried = LowRank(extra.b, extra.a) if carry else None
    members = cohort(len(ranks), seed=seed, ranks=ranks, old_weight=old_weight, carried=carried)
    exact = members.exact().dense()
    s = torch.linalg.svdvals(exact)
    b, a = BestRank().reduce(members)
    product = members.old.scale * b @ a
    assert float((exact - product).norm()) == pytest.approx(float(s[4:].norm()), abs=1e-10)
    # where S_4 > S_5 by a thousandth of S_1 it is unique: 1e-16 / 1e-3 a rounding
    assume(float(s[4]) < 1e-12 or gap(exact, 4) > 1e-3)
    assert float((best(exact, 4) - product).norm() / exact.norm()) < 1e-10
    torch.testing.assert_close(a @ a.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=FLOAT64)


def test_a_product_of_lower_rank_keeps_all_rows_of_a_alive():
    """Two equal clients of rank 2 under a global rank 4: B's last two columns are zero, A's rows orthonormal, the product untouched."""
    client = random_factors(2, 0.5, seed=3)
    members = ModuleCohort(old=random_factors(4, 1.5, seed=1), clients=(client, client), weights=(0.4, 0.6))
    b, a = BestRank().reduce(members)
    assert not b[:, 2:].any()
    assert bool(b[:, :2].any(0).all())
    torch.testing.assert_close(a @ a.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=FLOAT64)
    torch.testing.assert_close(1.5 * b @ a, whole(client), rtol=0, atol=FLOAT64 * 10)


def test_a_product_of_zero_keeps_a():
    old = random_factors(4, 1.5, seed=1)
    zero = Factors(torch.zeros_like(old.b), old.a, 1.5)
    b, a = BestRank().reduce(ModuleCohort(old=old, clients=(zero, zero), weights=(0.5, 0.5)))
    assert not b.any()
    assert torch.equal(a, old.a)


@laws
@given(seed=seeds, known=st.integers(0, 5), turned=st.booleans())
def test_completing_stays_within_what_the_spare_rows_span(seed, known, turned):
    """The known rows lie in the span of the first spare ones (as those of an A whose last directions have no weight): what is added
    are the spare directions that are left, not rounding that happens to be orthogonal.
    """
    generator = torch.Generator().manual_seed(seed)
    spare, _ = torch.linalg.qr(torch.randn(20, 5, generator=generator, dtype=torch.float64))
    spare = spare.T
    rows = rotation(known, generator) @ spare[:known] if turned and known else spare[:known]
    filled = completed(rows, spare)
    assert torch.equal(filled[:known], rows)
    torch.testing.assert_close(filled @ filled.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=FLOAT64)
    torch.testing.assert_close(filled @ spare.T @ spare, filled, rtol=0, atol=FLOAT64)


def test_completing_where_the_spare_rows_have_nothing_left():
    """Spare rows all alike: any directions do, orthonormal all the same."""
    rows = torch.eye(1, 6, dtype=torch.float64)
    filled = completed(rows, rows.repeat(3, 1))
    torch.testing.assert_close(filled @ filled.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=FLOAT64)


def test_completing_a_square_adapter():
    """r = d_in: as many orthonormal rows as there are columns."""
    filled = completed(torch.eye(2, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(filled.abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=FLOAT64)


def test_the_stack_leaves_b_empty():
    members = cohort()
    b, a = Stack().reduce(members)
    assert not b.any()
    assert b.shape == members.old.b.shape
    assert torch.equal(a, members.old.a)


def test_the_trimmed_mean_by_hand():
    """Trim 0.25 of 4: one from each end, entry by entry: (1, 2, 3, 100) -> 2.5; (-50, 4, 5, 6) -> 4.5. Of 3 clients none is left out: 0.75."""
    values = [(1, 4), (100, 5), (3, -50), (2, 6)]
    members = ModuleCohort(
        old=Factors(column(0, 0), row(1), 1.0),
        clients=tuple(Factors(column(*v), row(1), 1.0) for v in values),
        weights=(0.25,) * 4,
    )
    b, a = TrimmedMean(0.25).reduce(members)
    assert b.tolist() == [[2.5], [4.5]]
    assert a.tolist() == [[1.0]]
    three = ModuleCohort(old=members.old, clients=members.clients[:3], weights=(0.2, 0.2, 0.6))
    assert TrimmedMean(0.25).reduce(three)[0][0].item() == pytest.approx(104 / 3, rel=1e-15)


@pytest.mark.parametrize(
    ("trim", "clients", "left_out"), [(0.1, 10, 1), (0.2, 5, 1), (0.3, 10, 3), (0.29, 10, 2), (0.29, 100, 29)]
)
def test_how_many_are_trimmed(trim, clients, left_out):
    """floor(trim K), 0.29 * 100 = 28.999999999999996 counted as 29. Squares, whose trimmed mean tells how many, and one outlier."""
    values = [*(k**2 for k in range(clients - 1)), 1e9]
    members = ModuleCohort(
        old=Factors(column(0), row(1), 1.0),
        clients=tuple(Factors(column(v), row(1), 1.0) for v in values),
        weights=(1 / clients,) * clients,
    )
    kept = sorted(values)[left_out : clients - left_out]
    assert TrimmedMean(trim).reduce(members)[0].item() == pytest.approx(sum(kept) / len(kept), rel=1e-15)


@pytest.mark.parametrize(
    ("trim", "clients", "left_out"), [(0.4999999999, 2, 0), (0.4999999999, 4, 1), (0.3, 1, 0), (0.4, 5, 2)]
)
def test_somebody_is_always_left(trim, clients, left_out):
    """0.4999999999 x 2 counts as 1 by the rounding that 0.29 x 100 wants, and two of two would leave nothing: nan."""
    members = ModuleCohort(
        old=Factors(column(0), row(1), 1.0),
        clients=tuple(Factors(column(v), row(1), 1.0) for v in range(clients)),
        weights=(1 / clients,) * clients,
    )
    assert TrimmedMean(trim).num_left_out(clients) == left_out
    assert TrimmedMean(trim).reduce(members)[0].item() == (clients - 1) / 2


@laws
@given(seed=seeds, clients=st.integers(1, 9), trim=st.floats(0, 0.49))
def test_the_trimmed_mean_is_numpy_s(seed, clients, trim):
    members = cohort(clients, seed=seed)
    drop = int(trim * clients + 1e-9)
    wanted = np.sort(np.stack([client.b.numpy() for client in members.clients]), axis=0)[drop : clients - drop].mean(0)
    np.testing.assert_allclose(TrimmedMean(trim).reduce(members)[0].numpy(), wanted, rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("reducer", ALL, ids=lambda reducer: type(reducer).__name__)
def test_inputs_are_left_alone_and_outputs_are_float64(reducer):
    members = cohort(4, old_weight=0.1)
    before = [(client.b.clone(), client.a.clone()) for client in (*members.clients, members.old)]
    b, a = reducer.reduce(members)
    assert (b.dtype, a.dtype) == (torch.float64, torch.float64)
    assert (b.shape, a.shape) == (members.old.b.shape, members.old.a.shape)
    for client, (old_b, old_a) in zip((*members.clients, members.old), before, strict=True):
        assert torch.equal(client.b, old_b)
        assert torch.equal(client.a, old_a)


def test_the_ranks_that_each_can_miss_at_most():
    """Clients of ranks 3 and 2 under 4: a covariance or a stack 5, with the adapter's own factors taken off 9."""
    assert [reducer.residual_rank([3, 2], 4) for reducer in ALL] == [5, 9, 9, 5, 9]


def test_who_takes_clients_of_different_ranks():
    assert [reducer.mixes_ranks for reducer in ALL] == [False, True, True, True, False]


def test_a_mean_of_one_tensor_is_that_tensor():
    tensor = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mean_of((tensor,), (1.0,)), tensor.double())
