"""The algebra of s B A against dense float64 matrices: sums, inner products, norms, truncated SVDs, least ranks."""

import pytest
import safetensors.torch
import torch
from helpers_reduce import FLOAT64, gap, laws, seeds
from hypothesis import assume, given
from hypothesis import strategies as st

from fedunlearn.aggregation.factors import Factors
from fedunlearn.aggregation.product import (
    LowRank,
    compressed,
    inner_products,
    product_of,
    squared_norm,
    truncated_svd,
    update_of,
    weighted_sum,
)
from fedunlearn.records.adapter import hash_tensors

ranks = st.integers(0, 6)


def low_rank(d_out, d_in, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    return LowRank(left, torch.randn(rank, d_in, generator=generator, dtype=torch.float64))


def factors(rank, scale=2.0, seed=0, dtype=torch.float64, d_out=20, d_in=30):
    part = low_rank(d_out, d_in, rank, seed)
    return Factors(part.left.to(dtype), part.right.to(dtype), scale)


def whole(factors):
    return factors.scale * (factors.b.double() @ factors.a.double())


def test_a_product_by_hand():
    """3 [1; 2] [4 5] = [12 15; 24 30]."""
    part = product_of(Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0, 5.0]]), 3.0))
    assert part.dense().tolist() == [[12.0, 15.0], [24.0, 30.0]]
    assert (part.rank, part.left.dtype, part.right.dtype) == (1, torch.float64, torch.float64)


def test_a_product_of_float32_factors_is_scaled_in_float64():
    """A third of the float32 nearest 0.1: rounded once, to float64."""
    tenth = torch.tensor([[0.1]])
    assert product_of(Factors(tenth, torch.ones(1, 1), 1 / 3)).dense().item() == tenth.double().item() * (1 / 3)


def test_inner_products_by_hand():
    """P = [1; 0] [1 1], Q = [2; 1] [3 0]: <P, P> = 2, <P, Q> = 2 * 3 = 6, <Q, Q> = 5 * 9 = 45."""
    p = LowRank(torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[1.0, 1.0]]).double())
    q = LowRank(torch.tensor([[2.0], [1.0]]).double(), torch.tensor([[3.0, 0.0]]).double())
    assert inner_products([p, q]).tolist() == [[2.0, 6.0], [6.0, 45.0]]
    assert squared_norm(q) == 45.0


@laws
@given(seed=seeds, sizes=st.lists(ranks, min_size=1, max_size=5))
def test_sums_inner_products_and_norms_are_the_dense_ones(seed, sizes):
    parts = [low_rank(20, 30, rank, seed + i) for i, rank in enumerate(sizes)]
    weights = [0.3 * i - 0.5 for i in range(len(parts))]
    flat = torch.stack([part.dense().flatten() for part in parts])
    total = weighted_sum(weights, parts)
    torch.testing.assert_close(
        total.dense(), sum(w * p.dense() for w, p in zip(weights, parts, strict=True)), rtol=0, atol=FLOAT64
    )
    assert total.rank == sum(sizes)
    gram = inner_products(parts)
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, flat @ flat.T, rtol=0, atol=FLOAT64 * 20 * 30)
    for part, row in zip(parts, flat, strict=True):
        assert squared_norm(part) == pytest.approx(float(row @ row), rel=1e-12, abs=0)


@laws
@given(seed=seeds, rank=st.integers(1, 6), scale=st.floats(0.1, 8), own=st.floats(0.1, 8))
def test_an_update_is_the_difference_of_the_products(seed, rank, scale, own):
    """Ranks agree (4) and differ; scales differ: U = s_k B_k A_k - s B A, to rounding of its terms."""
    client, old = factors(rank, own, seed), factors(4, scale, seed + 1)
    wanted = whole(client) - whole(old)
    ours = update_of(client, old).dense()
    bound = FLOAT64 * float(whole(client).norm() + whole(old).norm())
    assert float((ours - wanted).norm()) < bound


@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5])
def test_a_small_update_keeps_its_digits_where_the_float32_expansion_loses_them(size):
    """An update of `size` times the adapter. The expanded ||P_k||^2 - 2 <P_k, P> + ||P||^2 in float32 is 3 % off at 1e-3, and worthless
    from 1e-4 on. Ours agrees with the dense way, which itself cancels to 1e-16 / size.
    """
    old = factors(8, seed=1, dtype=torch.float32, d_out=200, d_in=300)
    step = factors(8, seed=2, dtype=torch.float32, d_out=200, d_in=300)
    client = Factors(old.b + size * step.b, old.a + size * step.a, old.scale)
    wanted = float((whole(client) - whole(old)).norm())
    ours = squared_norm(update_of(client, old)) ** 0.5
    assert ours == pytest.approx(wanted, rel=1e-11)

    def trace(x, y):
        return x.scale * y.scale * float(torch.trace((x.b.T @ y.b) @ (y.a @ x.a.T)))

    expanded = max(trace(client, client) - 2 * trace(client, old) + trace(old, old), 0.0) ** 0.5
    off = abs(expanded - wanted) / wanted
    assert off > {1e-3: 0.01, 1e-4: 0.3, 1e-5: 1.0}[size]


def test_small_updates_keep_their_angles():
    """Two updates, 1e-4 of the adapter, at an angle: their cosine agrees with the dense one, which cancels to 1e-16 / 1e-4."""
    old = factors(4, seed=1, dtype=torch.float32)
    clients = []
    for seed in (2, 3):
        step = factors(4, seed=seed, dtype=torch.float32)
        clients.append(Factors(old.b + 1e-4 * step.b, old.a + 1e-4 * step.a, old.scale))
    gram = inner_products([update_of(client, old) for client in clients])
    x, y = ((whole(client) - whole(old)).flatten() for client in clients)
    assert float(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()) == pytest.approx(
        float(x @ y / (x.norm() * y.norm())), abs=1e-11
    )


def test_an_untouched_client_has_an_update_of_exactly_zero():
    old = factors(4, dtype=torch.float32)
    assert squared_norm(update_of(Factors(old.b.clone(), old.a.clone(), old.scale), old)) == 0.0


CORE, DENSE = 15, 16  # rank of the stack in a 16 x 24 matrix: below the smaller side, and at it


@laws
@given(seed=seeds, stack=st.sampled_from([1, 3, CORE, DENSE, 12, 40]), rank=st.integers(1, 16))
def test_the_truncated_svd_is_the_dense_one(seed, stack, rank):
    """Singular values always; the product where S_r > S_{r+1} by a thousandth of S_1: 1e-16 / 1e-3 a rounding, 1e-10 in all."""
    part = low_rank(16, 24, stack, seed)
    u, s, vt = torch.linalg.svd(part.dense(), full_matrices=False)
    ours = truncated_svd(part, rank)
    kept = min(rank, stack, 16)
    assert (ours.u.shape, ours.s.shape, ours.vt.shape) == ((16, kept), (kept,), (kept, 24))
    torch.testing.assert_close(ours.s, s[:kept], rtol=0, atol=1e-12 * float(s[0]))
    identity = torch.eye(kept, dtype=torch.float64)
    torch.testing.assert_close(ours.u.T @ ours.u, identity, rtol=0, atol=FLOAT64)
    torch.testing.assert_close(ours.vt @ ours.vt.T, identity, rtol=0, atol=FLOAT64)
    assume(kept == len(s) or float(s[kept - 1] - s[kept]) > 1e-3 * float(s[0]))
    wanted = (u[:, :kept] * s[:kept]) @ vt[:kept]
    assert float(((ours.u * ours.s) @ ours.vt - wanted).norm() / wanted.norm()) < 1e-10


def test_each_branch_of_the_size_switch_is_taken(monkeypatch):
    """The core asks for the SVD of a q x q matrix, the dense way for that of the whole."""
    sizes, plain = [], torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda matrix, **kw: sizes.append(tuple(matrix.shape)) or plain(matrix, **kw)
    )
    truncated_svd(low_rank(16, 24, CORE), 3)
    truncated_svd(low_rank(16, 24, DENSE), 3)
    truncated_svd(low_rank(24, 16, CORE), 3)
    truncated_svd(low_rank(24, 16, DENSE), 3)
    assert sizes == [(CORE, CORE), (16, 24), (CORE, CORE), (24, 16)]


@pytest.mark.parametrize("stack", [CORE, DENSE])
def test_signs_are_fixed_whatever_the_gauge(stack):
    """The largest entry of each column of u is positive, so another factoring of the same product has the same triplets."""
    part = low_rank(16, 24, stack)
    other = truncated_svd(LowRank(-part.left * 3, -part.right / 3), 5)
    ours = truncated_svd(part, 5)
    tops = ours.u.gather(0, ours.u.abs().argmax(0, keepdim=True))
    assert bool((tops > 0).all())
    torch.testing.assert_close(other.u, ours.u, rtol=0, atol=1e-10)
    torch.testing.assert_close(other.vt, ours.vt, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("d_out", "d_in", "stack"), [(5, 7, 0), (5, 7, 2), (40, 50, 3)])
def test_a_product_of_zero_has_triplets_of_zero(d_out, d_in, stack):
    part = LowRank(torch.zeros(d_out, stack).double(), torch.ones(stack, d_in).double())
    svd = truncated_svd(part, 2)
    assert not svd.s.any()
    assert svd.u.shape == (d_out, min(2, stack))
    assert svd.vt.shape == (min(2, stack), d_in)
    assert bool(svd.u.isfinite().all())


@laws
@given(seed=seeds, true_rank=st.integers(0, 5), copies=st.integers(1, 5))
def test_compressing_loses_nothing_and_finds_the_rank(seed, true_rank, copies):
    """Several stacked multiples of one matrix: both branches; what is left has that matrix's rank, split evenly between left and right."""
    one = low_rank(20, 30, true_rank, seed)
    assume(true_rank < 2 or gap(one.dense(), true_rank) > 1e-3)
    stack = weighted_sum([0.5 + i for i in range(copies)], [one] * copies)
    small = compressed(stack)
    assert small.rank == true_rank
    assert (small.left.shape, small.right.shape) == ((20, true_rank), (true_rank, 30))
    torch.testing.assert_close(small.dense(), stack.dense(), rtol=0, atol=FLOAT64)
    torch.testing.assert_close(small.left.norm(dim=0), small.right.norm(dim=1), rtol=1e-10, atol=0)


def test_compressing_to_a_rank_is_the_best_one():
    """Singular values 3, 2, 1 and rank 2: 1 is lost."""
    part = LowRank(torch.diag(torch.tensor([1.0, 3.0, 2.0])).double(), torch.eye(3, 4).double())
    small = compressed(part, 2)
    assert small.rank == 2
    assert float((small.dense() - part.dense()).norm()) == pytest.approx(1.0, abs=1e-12)


def test_a_floor_takes_rounding_away():
    """Singular values 3, 2e-6, 1e-9: of a floor of 1e-8 the first two are left, of none all three, of 5 nothing."""
    part = LowRank(torch.diag(torch.tensor([2e-6, 3.0, 1e-9], dtype=torch.float64)), torch.eye(3, 4).double())
    assert [compressed(part, floor=floor).rank for floor in (0.0, 1e-8, 5.0)] == [3, 2, 0]


def test_a_block_of_rank_0_survives_its_file():
    """Zero-size tensors through safetensors and the hash that names them."""
    small = compressed(LowRank(torch.zeros(5, 2).double(), torch.ones(2, 7).double()))
    block = {"q.lora_B.weight": small.left.float(), "q.lora_A.weight": small.right.float()}
    back = safetensors.torch.load(safetensors.torch.save(block))
    assert {name: tuple(tensor.shape) for name, tensor in back.items()} == {
        "q.lora_B.weight": (5, 0),
        "q.lora_A.weight": (0, 7),
    }
    assert hash_tensors(back) == hash_tensors(block)
    assert hash_tensors(block) != hash_tensors({**block, "q.lora_A.weight": torch.zeros(0, 8)})
    assert LowRank(back["q.lora_B.weight"], back["q.lora_A.weight"]).dense().tolist() == [[0.0] * 7] * 5
    assert inner_products([small, low_rank(5, 7, 2)])[0].tolist() == [0.0, 0.0]
