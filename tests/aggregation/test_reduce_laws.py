"""The published methods as choices: the laws of aggregation, by property."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers_reduce import (
    BEST,
    BLOCKED,
    ERROR,
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
    case_of,
    dense,
    factors_sent,
    has_gaps,
    laws,
    pooled,
    regauged,
    seeds,
    sent,
    stored,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from fedunlearn.aggregation.gauges.procrustes import Procrustes
from fedunlearn.aggregation.robust.geometric_median import GeometricMedian
from fedunlearn.aggregation.robust.krum import Krum, MultiKrum
from fedunlearn.aggregation.robust.norm_clipping import NormClipping
from fedunlearn.aggregation.weights import client_weights
from fedunlearn.records.rounds import ClientUpdate, Trained

clients = st.integers(1, 5)


def bits(reduced):
    """Everything in a result that could differ."""
    tensors = {
        f"{part}.{name}": tensor.numpy().tobytes()
        for part in ("mean", "block", "carried")
        for name, tensor in getattr(reduced, part).items()
    }
    return tensors, list(reduced.weights.items()), reduced.error, reduced.norm, reduced.replaces


@pytest.mark.parametrize("name", NAMES)
@laws
@given(seed=seeds, num_clients=clients, order=st.randoms(use_true_random=False))
def test_client_order_does_not_matter_bit_by_bit(name, seed, num_clients, order):
    case = case_of(name, num_clients, seed=seed)
    ids = list(case.weights)
    order.shuffle(ids)
    shuffled = replace(case, weights={k: case.weights[k] for k in ids}, clients={k: case.clients[k] for k in ids})
    assert bits(PRESETS[name].reduce(shuffled)) == bits(PRESETS[name].reduce(case))


@pytest.mark.parametrize("name", MIXING)
def test_client_order_does_not_matter_among_different_ranks(name):
    case = case_of(name, 3, rank=4, shapes=MIXED)
    for ids in itertools.permutations(case.weights):
        shuffled = replace(case, weights={k: case.weights[k] for k in ids}, shapes={k: case.shapes[k] for k in ids})
        assert bits(PRESETS[name].reduce(shuffled)) == bits(PRESETS[name].reduce(case))


@pytest.mark.parametrize("robust", [NormClipping(), Krum(), MultiKrum(), GeometricMedian()])
def test_client_order_does_not_matter_to_robust_weights(robust):
    case = case_of("fedit", 6)
    backwards = replace(case, weights=dict(reversed(case.weights.items())))
    assert bits(PRESETS["fedit"].reduce(backwards, robust)) == bits(PRESETS["fedit"].reduce(case, robust))


@pytest.mark.parametrize("name", NAMES)
@laws
@given(seed=seeds, num_clients=clients, round=st.integers(1, 3), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_equal_updates_give_that_update(name, seed, num_clients, round, dtype):
    """In product space, 1e-6; the active factors of FFA, RoLoRA and the trimmed mean too."""
    case = case_of(name, num_clients, seed=seed, dtype=dtype)
    first = next(iter(case.clients.values()))
    case = replace(case, clients=dict.fromkeys(case.clients, first))
    reduced = PRESETS[name].reduce(case, round=round)
    held = {**case.adapter, **first}
    assert apart(sent(case, reduced), {m: dense(held, m, case.scales[m]) for m in SIZES}) < FLOAT32
    assert reduced.error < FLOAT32
    if name in ("ffa", "rolora_even", "trimmed"):
        assert sorted(reduced.mean) == sorted(first)
        for tensor, mean in ((first[n], reduced.mean[n]) for n in first):
            torch.testing.assert_close(mean, tensor.double(), rtol=1e-14, atol=0)  # sum p_k is 1 to 1e-16


@pytest.mark.parametrize("name", ["fedex", "fedit", "fedrot", "flexlora_feedback"])
@pytest.mark.parametrize("num_clients", [1, 3])
def test_equal_updates_leave_no_residual(name, num_clients):
    """A residual that is rounding alone has rank 0, in the block and in the error feedback."""
    case = case_of(name, num_clients, dtype=torch.float32)
    case = replace(case, clients=dict.fromkeys(case.clients, next(iter(case.clients.values()))))
    reduced = PRESETS[name].reduce(case, round=1)
    assert all(tensor.numel() == 0 for tensor in (*reduced.block.values(), *reduced.carried.values()))
    assert reduced.error < ERROR
    if name in ("fedex", "flexlora_feedback"):
        assert reduced.block or reduced.carried


def test_one_client_alone_is_taken_bit_by_bit():
    case = case_of("fedit", 1, dtype=torch.float32)
    out = stored(case, PRESETS["fedit"].reduce(case))
    assert all(torch.equal(out[name], tensor) for name, tensor in case.clients[2].items())


def counted(case, rows):
    """p_k by rows owned, as the server gets them."""
    updates = [
        ClientUpdate(
            client_id=k, round=1, run_id="", tensors={}, num_examples=n, num_trained=n, num_steps=1, num_tokens=1, seconds=0.0, loss=0.0
        )
        for k, n in zip(case.weights, rows, strict=True)
    ]  # fmt: skip
    return replace(case, weights=client_weights(updates, "owned"))


@pytest.mark.parametrize("name", NAMES)
@laws
@given(seed=seeds, rows=st.lists(st.integers(1, 999), min_size=3, max_size=3), times=st.integers(2, 10**6))
def test_weights_are_scale_free(name, seed, rows, times):
    """Rows times a whole number give the same quotients, so the same bits."""
    case = case_of(name, seed=seed)
    many = counted(case, [times * n for n in rows])
    assert bits(PRESETS[name].reduce(many)) == bits(PRESETS[name].reduce(counted(case, rows)))


@pytest.mark.parametrize("name", NAMES)
@laws
@given(seed=seeds, factor=st.floats(1e-6, 1e6))
def test_weights_normalised_from_any_scale_agree_to_1e_12(name, seed, factor):
    """p_k then differ by 1e-16; float64 adapters, so that no cast makes more of it. The best rank-r by its gap: 1e-16 / 1e-3."""
    case = case_of(name, seed=seed)
    total = sum(factor * w for w in case.weights.values())
    other = replace(case, weights={k: factor * w / total for k, w in case.weights.items()})
    assume(name not in BEST or has_gaps(case.exact(), 3))
    ours, theirs = (factors_sent(case, PRESETS[name].reduce(c)) for c in (other, case))
    assert pooled({m: ours[m] - theirs[m] for m in SIZES}) <= 1e-12 * pooled(case.exact())


# Gauges of a decade either way: B and A then have a condition of up to 1e2, float64 algebra 1e-14, singular vectors by their gap 1e-11.
GAUGED = 1e-10


@pytest.mark.parametrize("name", ["flora", "fedex", "flexlora", "flexlora_theirs", "flexlora_feedback"])
@laws
@given(seed=seeds, num_clients=st.integers(1, 4))
def test_the_gauge_of_each_client_changes_nothing(name, seed, num_clients):
    """B R c and R^T A / c per client and module: the same products go out, side-car included (its float32 factors: 1e-6)."""
    case = case_of(name, num_clients, seed=seed)
    assume(name not in BEST or has_gaps(case.exact(), 3))
    other = regauged(case, seed + 1)
    ours, theirs = PRESETS[name].reduce(other), PRESETS[name].reduce(case)
    bound = FLOAT32 if name in BLOCKED else GAUGED
    assert apart(sent(other, ours), sent(case, theirs)) < bound
    assert ours.error == pytest.approx(theirs.error, abs=max(bound, ERROR))


@pytest.mark.parametrize("name", ["flora", "flexlora"])
def test_the_gauge_changes_nothing_among_different_ranks(name):
    case = case_of(name, 3, rank=4, shapes=MIXED, seed=1)
    other = regauged(case, 5)
    bound = FLOAT32 if name in BLOCKED else GAUGED
    assert apart(sent(other, PRESETS[name].reduce(other)), sent(case, PRESETS[name].reduce(case))) < bound


@pytest.mark.parametrize(
    "robust", [NormClipping(), Krum(), MultiKrum(), GeometricMedian()], ids=lambda r: type(r).__name__
)
@laws
@given(seed=seeds)
def test_the_gauge_of_each_client_changes_no_robust_weight(robust, seed):
    case = case_of("fedit", 6, seed=seed)
    ours = PRESETS["fedit"].reduce(regauged(case, seed + 1), robust).weights
    theirs = PRESETS["fedit"].reduce(case, robust).weights
    # Gram entries agree to 1e-13; Weiszfeld ends where it moves by less than 1e-10
    assert ours == pytest.approx(theirs, abs=1e-7 if isinstance(robust, GeometricMedian) else GAUGED)


@laws
@given(seed=seeds, round=st.integers(2, 3))
def test_full_procrustes_undoes_rotations(seed, round):
    """FedRot at softness 1: any rotation of a client's factors is turned back, in rounds by A and by B."""
    case = case_of("fedrot", seed=seed)
    full = replace(PRESETS["fedrot"], gauge=Procrustes(1.0))
    other = regauged(case, seed + 1, rescale=False)
    assert apart(sent(case, full.reduce(other, round=round)), sent(case, full.reduce(case, round=round))) < 1e-8


@pytest.mark.parametrize("name", ["fedit", "hetlora", "fedrot"])
def test_the_gauge_matters_to_the_means_of_factors(name):
    """And to FedRot short of softness 1: the same products, turned by each client, give another global one, by 5 % and more."""
    case = case_of(name, seed=3)
    other = regauged(case, 4, rescale=False)
    assert apart(sent(other, PRESETS[name].reduce(other)), sent(case, PRESETS[name].reduce(case))) > 0.05


def test_rescaling_matters_even_to_full_procrustes():
    """One client of half the weight sends 2 B and A / 2."""
    case, full = case_of("fedrot", seed=3), replace(PRESETS["fedrot"], gauge=Procrustes(1.0))
    heaviest = max(case.weights, key=case.weights.get)
    doubled = {n: t * (2.0 if ".lora_B." in n else 0.5) for n, t in case.clients[heaviest].items()}
    other = replace(case, clients=case.clients | {heaviest: doubled})
    assert apart(sent(other, full.reduce(other)), sent(case, full.reduce(case))) > 0.05


@laws
@given(seed=seeds, num_clients=clients)
def test_what_the_mean_of_factors_misses_is_their_covariance(seed, num_clients):
    """sum p B A - Bbar Abar = sum p (B - Bbar)(A - Abar), so at most (K - 1) r ranks of it."""
    case = case_of("fedit", num_clients, seed=seed)
    out = factors_sent(case, PRESETS["fedit"].reduce(case))
    for module, exact in case.exact().items():
        means = {
            n: sum(w * case.clients[k][n] for k, w in case.weights.items()) for n in (a_name(module), b_name(module))
        }
        covariance = sum(
            w * dense({n: case.clients[k][n] - mean for n, mean in means.items()}, module, case.scales[module])
            for k, w in case.weights.items()
        )
        missed = exact - out[module]
        torch.testing.assert_close(missed, covariance, rtol=0, atol=FLOAT64 * 10)
        assert int((torch.linalg.svdvals(missed) > FLOAT64 * float(exact.norm())).sum()) <= (num_clients - 1) * 3


@pytest.mark.parametrize("name", NAMES)
@laws
@given(seed=seeds, num_clients=clients, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_rank_bounds(name, seed, num_clients, dtype):
    """The factors have the adapter's shapes; FedEx's block (K - 1) r ranks, with float32 factors too; FLoRA's K r; feedback the rest."""
    case = case_of(name, num_clients, seed=seed, dtype=dtype)
    reduced = PRESETS[name].reduce(case)
    assert all(reduced.mean[n].shape == case.adapter[n].shape for n in reduced.mean)
    for module, sides in SIZES.items():
        allowed = {
            "flora": num_clients * 3,
            "fedex": (num_clients - 1) * 3,
            "flexlora_feedback": (num_clients - 1) * 3,
        }.get(name, 0)
        for part in (reduced.block, reduced.carried):
            if part:
                rank = part[a_name(module)].shape[0]
                assert part[b_name(module)].shape == (sides[0], rank)
                assert rank <= min(allowed, *sides)
    assert bool(reduced.block) == (name in BLOCKED)
    assert bool(reduced.carried) == (name == "flexlora_feedback")


@pytest.mark.parametrize("name", NAMES)
@laws
@given(seed=seeds, num_clients=clients)
def test_clients_that_change_nothing_change_nothing(name, seed, num_clients):
    case = case_of(name, num_clients, seed=seed, spread=0.0, dtype=torch.float32)
    reduced = PRESETS[name].reduce(case)
    assert apart(sent(case, reduced), case.old()) < FLOAT32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("robust", [None, NormClipping(), GeometricMedian()])
def test_an_empty_adapter_nobody_moves(name, robust):
    """B = 0 everywhere: nothing is lost, nothing is nan, blocks have rank 0, and A is as it was, or drawn anew by FLoRA."""
    case = case_of(name, 3, spread=0.0, zero_b=True, dtype=torch.float32)
    if name == "trimmed":
        robust = None
    reduced = PRESETS[name].reduce(case, robust)
    assert (reduced.error, reduced.norm) == (0.0, 0.0)
    out = stored(case, reduced)
    assert all(not out[b_name(module)].any() for module in SIZES)
    assert all(tensor.numel() == 0 for tensor in (*reduced.block.values(), *reduced.carried.values()))
    for module in SIZES:
        assert torch.equal(out[a_name(module)], case.adapter[a_name(module)]) == (name != "flora")


def test_flora_starts_every_round_from_the_same_a_for_all():
    """Drawn from run seed and round: not from the clients, their number or the round's attempt."""
    case, fewer = case_of("flora", 3), case_of("flora", 2, seed=9)
    a = a_name("layers.0.q")
    base = PRESETS["flora"].reduce(case, round=4, seed=7).mean[a]
    assert torch.equal(PRESETS["flora"].reduce(fewer, round=4, seed=7).mean[a], base)
    assert not torch.equal(PRESETS["flora"].reduce(case, round=5, seed=7).mean[a], base)
    assert not torch.equal(PRESETS["flora"].reduce(case, round=4, seed=8).mean[a], base)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_change_are_named(name):
    """Both factors where the gauge moves, else those trained."""
    case = case_of(name)
    only = {"ffa": ".lora_B.", "trimmed": ".lora_B.", "rolora_even": ".lora_A."}.get(name, ".lora_")
    assert list(PRESETS[name].reduce(case).mean) == sorted(n for n in case.adapter if only in n)


@pytest.mark.parametrize(("name", "robust"), [("ffa", None), ("rolora_even", None), ("fedex", Krum()), ("flora", None)])
def test_tensors_are_asked_for_module_by_module_and_only_those_trained(name, robust):
    """One pass, two with robust weights; within a pass all of a module before the next. A side-car that only grows is not read."""
    case, asked = case_of(name, 5), []

    def read(client, tensor):
        asked.append((client, tensor))
        return case.clients[client][tensor]

    PRESETS[name].reduce(case, robust, read=read, blocks=None)
    trained = [n for n in case.adapter if case.trained.covers(n)]
    passes = 2 if robust else 1
    assert len(asked) == passes * len(trained) * 5
    modules = [tensor.split(".lora_")[0] for _, tensor in asked]
    assert len([1 for before, now in itertools.pairwise(modules) if before != now]) == passes * len(SIZES) - 1


def test_nothing_that_comes_in_is_changed():
    for name in NAMES:
        case = case_of(name, 5, dtype=torch.float32)
        before = {n: t.clone() for n, t in case.adapter.items()}
        theirs = {k: {n: t.clone() for n, t in c.items()} for k, c in case.clients.items()}
        reduced = PRESETS[name].reduce(case, None if name == "trimmed" else GeometricMedian())
        for tensor in reduced.mean.values():
            tensor.fill_(7)
        assert all(torch.equal(case.adapter[n], t) for n, t in before.items())
        assert all(torch.equal(case.clients[k][n], t) for k, c in theirs.items() for n, t in c.items())


def test_the_masks_cover_what_they_say():
    assert [Trained.B.covers(n) for n in (a_name("q"), b_name("q"))] == [False, True]
    assert [Trained.A.covers(n) for n in (a_name("q"), b_name("q"))] == [True, False]
    assert Trained.BOTH.covers(a_name("q"))
