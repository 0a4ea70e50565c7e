"""The published methods as choices: a round, and several, against the dense float64 way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_reduce import (
    AVERAGED,
    BEST,
    BLOCKED,
    ERROR,
    EXACT,
    FLOAT32,
    FLOAT64,
    MIXED,
    MIXING,
    NAMES,
    PRESETS,
    SIZES,
    a_name,
    apart,
    b_name,
    best,
    block_of,
    case_of,
    dense,
    factors_sent,
    has_gaps,
    laws,
    pooled,
    seeds,
    sent,
    stored,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from fedunlearn.aggregation.factors import cut_to
from fedunlearn.aggregation.product import LowRank
from fedunlearn.aggregation.reduce import reduce_round, update_norms
from fedunlearn.aggregation.robust.krum import Krum
from fedunlearn.aggregation.robust.norm_clipping import NormClipping
from fedunlearn.records.shape import ClientShape

clients = st.integers(1, 5)


def rank_of(case):
    return case.adapter[a_name("layers.0.q")].shape[0]


def turned(a, b, ref_a, ref_b, softness, round):
    """FedRot's step in numpy: Kabsch by A in even rounds, by B in odd ones, then softened."""

    def kabsch(matrix):
        u, _, vt = np.linalg.svd(matrix)
        u[:, -1] *= np.sign(np.linalg.det(u) * np.linalg.det(vt))
        return u @ vt

    r = kabsch(a @ ref_a.T if round % 2 == 0 else b.T @ ref_b)
    r = kabsch((1 - softness) * np.eye(len(r)) + softness * r)
    return r.T @ a, b @ r


def dense_way(name, case, weights=None, old_weight=0.0, round=2):
    """What the factors that go out multiply to, by module: plain numpy and dense SVDs."""
    weights = weights or [case.weights[k] for k in sorted(case.weights)]
    products = {}
    for module, exact in case.exact(tuple(weights), old_weight).items():
        scale, rank = case.scales[module], rank_of(case)
        ref_a, ref_b = (case.adapter[n].double().numpy() for n in (a_name(module), b_name(module)))
        if name == "flora":
            products[module] = torch.zeros_like(exact)
            continue
        if name in BEST:
            products[module] = best(exact, rank)
            continue
        pairs = []
        for k in sorted(case.clients):
            held = {**case.adapter, **case.clients[k]}
            a, b = held[a_name(module)].double().numpy(), held[b_name(module)].double().numpy()
            if name == "hetlora":
                root = (case.scale(k, module) / scale) ** 0.5
                short = rank - len(a)
                a, b = np.pad(root * a, ((0, short), (0, 0))), np.pad(root * b, ((0, 0), (0, short)))
            pairs.append(turned(a, b, ref_a, ref_b, 0.5, round) if name == "fedrot" else (a, b))
        if name == "trimmed":
            drop = int(0.34 * len(pairs))
            mean_b = np.sort(np.stack([b for _, b in pairs]), axis=0)[drop : len(pairs) - drop].mean(0)
            mean_a = ref_a
        else:
            mean_a = sum(w * a for w, (a, _) in zip(weights, pairs, strict=True)) + old_weight * ref_a
            mean_b = sum(w * b for w, (_, b) in zip(weights, pairs, strict=True)) + old_weight * ref_b
        products[module] = torch.from_numpy(scale * mean_b @ mean_a)
    return products


def check_error(case, reduced, exact):
    assert reduced.error == pytest.approx(apart(sent(case, reduced), exact), abs=ERROR)
    assert reduced.norm == pytest.approx(pooled(exact), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@laws
@given(seed=seeds, num_clients=clients, round=st.integers(2, 3))
def test_every_preset_is_its_dense_way(name, seed, num_clients, round):
    case = case_of(name, num_clients, seed=seed)
    exact = case.exact()
    assume(name not in BEST or has_gaps(exact, 3))
    reduced = PRESETS[name].reduce(case, round=round)
    assert apart(factors_sent(case, reduced), dense_way(name, case, round=round)) < (1e-10 if name in BEST else FLOAT64)
    if name in BLOCKED:
        assert apart(sent(case, reduced), exact) < FLOAT32
    if name in EXACT:
        assert reduced.error < ERROR
    check_error(case, reduced, exact)


@pytest.mark.parametrize("name", NAMES)
def test_a_float32_adapter_is_rounded_once(name):
    """The mean comes in float64; what goes out is that, cast, and the error is that of what goes out."""
    case = case_of(name, dtype=torch.float32)
    reduced = PRESETS[name].reduce(case)
    assert all(tensor.dtype == torch.float64 for tensor in reduced.mean.values())
    assert all(tensor.dtype == torch.float32 for tensor in (*reduced.block.values(), *reduced.carried.values()))
    assert apart(factors_sent(case, reduced), dense_way(name, case)) < FLOAT32
    check_error(case, reduced, case.exact())


def test_the_error_counts_what_the_cast_loses():
    """A bfloat16 adapter: 2**-9 an entry, in the error of an exact mask, and in the block of FedEx, which makes up for it."""
    plain, fedex = case_of("ffa", dtype=torch.bfloat16), case_of("fedex", dtype=torch.bfloat16)
    reduced = PRESETS["ffa"].reduce(plain)
    assert 1e-4 < reduced.error < 2**-8
    check_error(plain, reduced, plain.exact())
    whole = PRESETS["fedex"].reduce(fedex)
    assert apart(sent(fedex, whole), fedex.exact()) < FLOAT32
    check_error(fedex, whole, fedex.exact())


@pytest.mark.parametrize("name", MIXING)
@laws
@given(seed=seeds, subset=st.sampled_from([(0, 1, 2), (0, 2), (1,), (0,)]))
def test_ranks_and_scales_of_their_own(name, seed, subset):
    """Ranks 1, 4, 2 with alphas 3, 2 and 5 / sqrt 2, under a global rank of 4; also cohorts none of whose members has the full rank."""
    case = case_of(name, len(subset), rank=4, shapes=[MIXED[i] for i in subset], seed=seed)
    exact = case.exact()
    assume(name not in BEST or has_gaps(exact, 4))
    reduced = PRESETS[name].reduce(case)
    assert apart(factors_sent(case, reduced), dense_way(name, case)) < (1e-10 if name in BEST else FLOAT64)
    if name == "flora":
        assert apart(sent(case, reduced), exact) < FLOAT32
        assert reduced.block[a_name("layers.0.q")].shape[0] == sum(MIXED[i].rank for i in subset)
    check_error(case, reduced, exact)


@pytest.mark.parametrize("name", ["flexlora", "flexlora_theirs"])
@laws
@given(seed=seeds)
def test_each_client_is_sent_the_best_product_of_its_own_rank(name, seed):
    """cut_to after FlexLoRA: s_k B_k A_k is the best rank-r_k of the exact product."""
    case = case_of(name, 3, rank=4, shapes=MIXED, seed=seed)
    exact = case.exact()
    assume(all(has_gaps(exact, shape.rank) for shape in MIXED))
    out = stored(case, PRESETS[name].reduce(case))
    for shape in MIXED:
        cut = cut_to(shape, out, case.scales)
        for module in SIZES:
            product = dense(cut, module, shape.scale)
            assert float((product - best(exact[module], shape.rank)).norm() / exact[module].norm()) < 1e-10


@pytest.mark.parametrize("name", AVERAGED)
@laws
@given(seed=seeds, num_clients=st.integers(2, 5))
def test_what_clipping_takes_from_clients_stays_with_the_old_adapter(name, seed, num_clients):
    """Dense: weights c_k p_k and sum p_k (1 - c_k) on the old product; U_k then has norm c_k ||U_k|| <= the median."""
    case = case_of(name, num_clients, seed=seed)
    norms = torch.stack([case.updates(k).norm() for k in sorted(case.clients)])
    bound = float(norms.quantile(0.5))
    shares = [min(1.0, bound / float(n)) for n in norms]
    weights = [case.weights[k] * c for k, c in zip(sorted(case.weights), shares, strict=True)]
    old_weight = 1 - sum(weights)
    exact = case.exact(tuple(weights), old_weight)
    assume(name not in BEST or has_gaps(exact, 3))
    reduced = PRESETS[name].reduce(case, NormClipping())
    assert list(reduced.weights.values()) == pytest.approx(weights, rel=1e-12)
    tight = 1e-10 if name in BEST else FLOAT64
    assert apart(factors_sent(case, reduced), dense_way(name, case, weights, old_weight)) < tight
    check_error(case, reduced, exact)
    if name in EXACT:
        moved = {m: p - case.old()[m] for m, p in sent(case, reduced).items()}
        assert pooled(moved) <= bound * (1 + 1e-6) + FLOAT32 * pooled(exact)


def test_robust_weights_see_dense_updates():
    """The Gram matrix is that of the dense U_k, all modules together, also among different ranks: a spy stands in for a member."""
    seen = []

    class Spy(NormClipping):
        def reweigh(self, weights, gram):
            seen.append((weights, gram))
            return super().reweigh(weights, gram)

    for case in (case_of("fedit", 4), case_of("hetlora", 3, rank=4, shapes=MIXED), case_of("ffa", 3)):
        PRESETS["flora"].reduce(case, Spy())
        weights, gram = seen.pop()
        flat = torch.stack([case.updates(k) for k in sorted(case.clients)])
        torch.testing.assert_close(gram, flat @ flat.T, rtol=1e-10, atol=FLOAT64 * float((flat @ flat.T).max()))
        assert weights == tuple(case.weights[k] for k in sorted(case.weights))


@pytest.mark.parametrize("name", AVERAGED)
def test_krum_keeps_one_client_and_what_it_sent_goes_out(name):
    """Five clients close together and one a million times farther, of the lowest id: one of the five goes out as it is."""
    case = case_of(name, 6, spread=0.05)
    case = replace(case, clients=case.clients | {2: {n: 1e3 * t for n, t in case.clients[2].items()}})
    reduced = PRESETS[name].reduce(case, Krum())
    (kept,) = [k for k, weight in reduced.weights.items() if weight == 1.0]
    assert sum(reduced.weights.values()) == 1.0
    assert kept != 2
    held = {**case.adapter, **case.clients[kept]}
    assert apart(sent(case, reduced), {m: dense(held, m, case.scales[m]) for m in SIZES}) < FLOAT32


def following(case, out, seed, spread=0.2):
    """The next round: clients `spread` away from what went out."""
    generator = torch.Generator().manual_seed(seed)
    clients = {
        k: {n: t + spread * torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in out.items()}
        for k in case.clients
    }
    return replace(case, adapter=out, clients=clients)


def mean_update(case):
    old = case.old()
    return {module: exact - old[module] for module, exact in case.exact().items()}


@laws
@given(seed=seeds, robust=st.sampled_from([None, NormClipping()]))
def test_error_feedback_loses_nothing_over_the_rounds(seed, robust):
    """What goes out plus what is carried is the start plus the exact mean update of every round, to the carried factors' float32;
    without feedback the same rounds end somewhere else.
    """
    preset = PRESETS["flexlora_feedback"]
    case = case_of("flexlora", 3, seed=seed)
    wanted, carried = case.old(), {}
    for round in range(1, 5):
        reduced = preset.reduce(case, robust, round=round, carried=carried)
        old = case.old()
        weights = tuple(reduced.weights.values())
        for module, exact in case.exact(weights, 1 - sum(weights)).items():
            wanted[module] = wanted[module] + exact - old[module]
        carried, out = reduced.carried, factors_sent(case, reduced)
        both = {m: out[m] + dense(carried, m, 1.0) for m in SIZES}
        assert apart(both, wanted) < FLOAT32
        assert reduced.error == pytest.approx(apart(out, both), abs=FLOAT32)
        case = following(case, stored(case, reduced), seed + round)
    assert apart(out, wanted) > 0.01


def taken_up(held, reduced):
    """The side-car by module after a round."""
    new = {m: LowRank(reduced.block[b_name(m)].double(), reduced.block[a_name(m)].double()) for m in SIZES}
    if reduced.replaces or not held:
        return new
    return {
        m: LowRank(torch.cat([held[m].left, new[m].left], 1), torch.cat([held[m].right, new[m].right], 0))
        for m in SIZES
    }


def with_sidecar(held):
    """What the server says of its side-car."""
    return {
        "blocks": lambda module: held.get(module.name),
        "block_rank": {name: part.rank for name, part in held.items()},
    }


@pytest.mark.parametrize("name", BLOCKED)
def test_the_side_car_stays_exact_past_its_largest_rank(name):
    """Six rounds of 4 clients of rank 3: FLoRA adds 12 a round and FedEx 9 to matrices of 26 and 28: the stack would pass them in round 3,
    and is replaced by one of their rank. Factors and side-car are the start plus every mean update all along. The error is relative to
    the round's product, the cast that of the whole side-car.
    """
    preset, case, held, replaced = PRESETS[name], case_of(name, 4, seed=1), {}, []
    wanted = case.old()
    for round in range(1, 7):
        wanted = {m: wanted[m] + moved for m, moved in mean_update(case).items()}
        reduced = preset.reduce(case, round=round, **with_sidecar(held))
        held = taken_up(held, reduced)
        out = factors_sent(case, reduced)
        assert apart({m: out[m] + held[m].dense() for m in SIZES}, wanted) < FLOAT32
        assert reduced.error < FLOAT32 * max(1.0, pooled(wanted) / reduced.norm)
        assert all(part.rank <= min(SIZES[m]) for m, part in held.items())
        replaced.append(reduced.replaces)
        case = following(case, stored(case, reduced), round)
    assert replaced == [False, False, True, True, True, True]


@pytest.mark.parametrize("name", BLOCKED)
def test_a_side_car_of_fixed_rank_is_the_best_one_every_round(name):
    """sidecar_rank 5: each round's block stands for the whole side-car, is the best rank 5 of what was held plus what is left over,
    and the error is what that cuts, relative to the round's exact product.
    """
    preset, case, held = PRESETS[name], case_of(name, 4, seed=2), {}
    for round in range(1, 5):
        exact = case.exact()
        reduced = reduce_round(preset.choices(sidecar_rank=5), case.cohort(round=round, **with_sidecar(held)))
        assert reduced.replaces
        out = factors_sent(case, reduced)
        before = {m: held[m].dense() if held else torch.zeros(SIZES[m]).double() for m in SIZES}
        whole = {m: before[m] + exact[m] - out[m] for m in SIZES}
        assert has_gaps(whole, 5)
        held = taken_up(held, reduced)
        assert all(part.rank == 5 for part in held.values())
        # float32 factors, and singular vectors by their gap
        assert apart({m: held[m].dense() for m in SIZES}, {m: best(whole[m], 5) for m in SIZES}) < FLOAT32
        cut = pooled({m: whole[m] - held[m].dense() for m in SIZES})
        assert reduced.error == pytest.approx(cut / pooled(exact), abs=FLOAT32)
        assert reduced.error > 0.01
        case = following(case, stored(case, reduced), round)


def test_a_side_car_of_fixed_rank_that_holds_all_of_it_is_exact():
    """FedEx, 2 clients of rank 3, one round: 3 ranks are left over, and r' = 3 holds them."""
    case = case_of("fedex", 2, seed=2)
    reduced = reduce_round(PRESETS["fedex"].choices(sidecar_rank=3), case.cohort())
    assert apart(sent(case, reduced), case.exact()) < FLOAT32
    assert {m: reduced.block[a_name(m)].shape[0] for m in SIZES} == dict.fromkeys(SIZES, 3)


def test_flora_s_block_is_the_stack_itself():
    """Columns p_k s_k B_k in client order beside the clients' own rows A_k, float32: no SVD stirs them."""
    case = case_of("flora", 2, dtype=torch.float32)
    reduced = PRESETS["flora"].reduce(case)
    for module in SIZES:
        rows = torch.cat([case.clients[k][a_name(module)] for k in (2, 5)])
        columns = [case.weights[k] * case.scales[module] * case.clients[k][b_name(module)].double() for k in (2, 5)]
        assert torch.equal(reduced.block[a_name(module)], rows)
        # two factors in either order: one unit in the last place of float64, then the cast
        torch.testing.assert_close(reduced.block[b_name(module)], torch.cat(columns, 1).float(), rtol=2**-23, atol=0)


@laws
@given(seed=seeds, spread=st.sampled_from([0.3, 1e-4]))
def test_norms_the_gate_sees_are_dense_ones(seed, spread):
    """A spread of 1e-4: the dense difference itself cancels to 1e-12 of its size."""
    case = case_of("fedit", 1, seed=seed, spread=spread)
    norms = update_norms(case.clients[2], case.adapter, case.scales)
    assert norms.update == pytest.approx(float(case.updates(2).norm()), rel=1e-9)
    assert norms.product == pytest.approx(pooled(case.exact()), rel=1e-12)
    flat = {name: tensor.double() for name, tensor in case.adapter.items()}
    changed = {name: case.clients[2][name].double() - old for name, old in flat.items()}
    assert norms.start == pytest.approx(pooled(flat), rel=1e-12)
    assert norms.factors == pytest.approx(pooled(changed), rel=1e-12)


def test_a_client_of_half_the_rank_counts_with_its_product_alone():
    """FLoRA of one client of rank 1 whose scale is its own: alpha 3 and rank 1, 3 B A."""
    case = case_of("flora", 1, rank=4, shapes=[ClientShape(rank=1, lora_alpha=3.0)])
    reduced = PRESETS["flora"].reduce(case)
    for module in SIZES:
        wanted = dense(case.clients[2], module, 3.0)
        torch.testing.assert_close(block_of(reduced, module), wanted, rtol=0, atol=FLOAT32 * float(wanted.norm()))
