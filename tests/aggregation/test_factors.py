"""LoRA factors by module: pairing, scales as PEFT has them, cutting to a client's rank and padding back."""

import gc
import math
import weakref

import pytest
import torch
from helpers_reduce import FLOAT32, FLOAT64, a_name, b_name, dense, laws, seeds
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from fedunlearn.aggregation.factors import (
    Factors,
    Module,
    cut_to,
    fresh_a,
    modules_of,
    padded_to,
    plain_of,
    read_factors,
    scale_of,
    scales_of,
)
from fedunlearn.records.shape import ClientShape, lora_scale

Q = Module("layers.0.q", a_name("layers.0.q"), b_name("layers.0.q"))


def adapter(rank=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        Q.a: torch.randn(rank, 7, generator=generator, dtype=torch.float64).to(dtype),
        Q.b: torch.randn(5, rank, generator=generator, dtype=torch.float64).to(dtype),
    }


def test_tensors_pair_in_name_order_whatever_their_own():
    names = [a_name("b"), b_name("b"), a_name("a"), b_name("a")]
    assert modules_of(names) == (Module("a", a_name("a"), b_name("a")), Module("b", a_name("b"), b_name("b")))


@pytest.mark.parametrize("odd", [a_name("lone"), b_name("lone")])
def test_a_factor_without_partner_is_refused_by_name(odd):
    with pytest.raises(ValueError, match=f"adapter tensor {odd!r} is a LoRA factor without a partner"):
        modules_of([Q.a, Q.b, odd])


def test_what_is_no_factor_is_plain():
    """DoRA's magnitudes, a bias of B, a saved module, AdaLoRA's factors (which go by their singular values)."""
    plain = [
        "base_model.model.q.lora_magnitude_vector",
        "base_model.model.q.lora_B.bias",
        "base_model.model.head.weight",
        "base_model.model.v.lora_A",
    ]
    assert modules_of([Q.a, *plain, Q.b]) == (Q,)
    assert plain_of([Q.a, *plain, Q.b]) == tuple(sorted(plain))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 16}, 4.0),
        ({"lora_alpha": 16, "use_rslora": True}, 8.0),
        ({"lora_alpha": 16, "alpha_pattern": {"q": 2}}, 0.5),
        ({"lora_alpha": 16, "alpha_pattern": {"layers.0.q": 2}, "use_rslora": True}, 1.0),
        ({"lora_alpha": 16, "alpha_pattern": {r"layers\.\d+\.q": 8, "q": 2}}, 2.0),
        ({"lora_alpha": 16, "alpha_pattern": {"0.q_proj": 2, "ers.0.q": 2, "^q": 2}}, 4.0),
        ({"lora_alpha": 16, "alpha_pattern": {}}, 4.0),
        ({"lora_alpha": 16, "alpha_pattern": None}, 4.0),
    ],
)
def test_scales_by_hand(config, scale):
    """Rank 4: 16/4; 16/sqrt 4; a pattern's 2/4 and 2/sqrt 4; the first that matches; only whole path parts at the end match."""
    assert scale_of(config, Q, 4) == scale


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scales_are_those_peft_acts_with(use_rslora):
    """Every LoRA layer's own `scaling`, under rank and alpha patterns that match some layers, twice, and not at all."""
    net = torch.nn.Module()
    for name in ("g", "k", "other"):
        block = torch.nn.Module()
        block.q, block.v = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)
        net.add_module(name, block)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q", "v"],
        use_rslora=use_rslora,
        rank_pattern={"k.q": 2, "v": 3},
        alpha_pattern={"g.v": 5, r"k\.(q|v)": 7, "v": 9},
    )
    model = get_peft_model(net, config)
    tensors = get_peft_model_state_dict(model)
    acting = {
        path.removeprefix("base_model.model."): layer.scaling["default"]
        for path, layer in model.named_modules()
        if hasattr(layer, "scaling")
    }
    assert scales_of(config.to_dict(), tensors) == pytest.approx(acting, rel=1e-15)  # one division each, the same one
    assert len({round(scale, 6) for scale in acting.values()}) > 3


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 16), (True, 8 / 4)])
def test_a_client_s_scale_by_hand(rslora, scale):
    """Alpha 8, rank 16: 8/16, or 8/sqrt 16."""
    assert ClientShape(rank=16, lora_alpha=8, use_rslora=rslora).scale == scale
    assert lora_scale(8, 16, rslora) == scale


def test_factors_of_one_module():
    tensors = adapter(dtype=torch.float32)
    factors = read_factors(tensors, Q, 2.5)
    assert (factors.rank, factors.scale) == (3, 2.5)
    assert factors.b is tensors[Q.b]
    assert factors.a is tensors[Q.a]
    assert (factors.double.a.dtype, factors.double.b.dtype, factors.double.scale) == (torch.float64, torch.float64, 2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_freed_with_their_last_name(dtype):
    """One that names itself waits for the collector: twice the memory of a reduction, in benchmarks/aggregation.py."""
    gc.disable()
    try:
        factors = read_factors(adapter(dtype=dtype), Q, 2.5)
        assert factors.double.double is factors.double
        gone = [weakref.ref(factors), weakref.ref(factors.double)]
        del factors
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_cutting_by_hand():
    """s = 8, s_k = 4/2 = 2: share sqrt(8/2) = 2. A [[1], [2], [3]] -> [[2], [4]]; B [[1, 10, 100]] -> [[2, 20]].

    Product: 2 (2 * 2 + 20 * 4) = 168 = 8 (1 * 1 + 10 * 2).
    """
    tensors = {Q.a: torch.tensor([[1.0], [2.0], [3.0]]), Q.b: torch.tensor([[1.0, 10.0, 100.0]])}
    cut = cut_to(ClientShape(rank=2, lora_alpha=4), tensors, {Q.name: 8.0})
    assert cut[Q.a].tolist() == [[2.0], [4.0]]
    assert cut[Q.b].tolist() == [[2.0, 20.0]]


@laws
@given(
    seed=seeds,
    rank=st.integers(1, 5),
    alpha=st.floats(0.1, 64),
    scale=st.floats(0.05, 32),
    use_rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_s_k_times_the_cut_product_is_s_times_the_product_of_the_first_r_k(seed, rank, alpha, scale, use_rslora, dtype):
    tensors = adapter(5, dtype, seed)
    shape = ClientShape(rank=rank, lora_alpha=alpha, use_rslora=use_rslora)
    cut = cut_to(shape, tensors, {Q.name: scale})
    wanted = scale * tensors[Q.b].double()[:, :rank] @ tensors[Q.a].double()[:rank]
    ours = dense(cut, "layers.0.q", shape.scale)
    bound = FLOAT32 if dtype == torch.float32 else FLOAT64
    # rounding is relative to the factors' norms: their product may cancel
    size = scale * float(tensors[Q.b].double()[:, :rank].norm() * tensors[Q.a].double()[:rank].norm())
    assert float((ours - wanted).norm()) < bound * size
    assert cut[Q.a].shape == (rank, 7)
    assert cut[Q.b].shape == (5, rank)
    assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in cut.values())


def test_a_client_of_the_adapter_s_own_shape_is_sent_the_same_bits():
    tensors = adapter(3, torch.float32)
    cut = cut_to(ClientShape(rank=3, lora_alpha=6), tensors, {Q.name: 2.0})
    assert all(torch.equal(cut[name], tensors[name]) for name in tensors)


def test_padding_by_hand():
    """s_k = 8 to s = 2 and rank 1 to 3: both factors times sqrt(8/2) = 2, then zeros: 2 (6 * 10) = 120 = 8 (3 * 5)."""
    padded = padded_to(3, 2.0, Factors(torch.tensor([[3.0]]), torch.tensor([[5.0]]), 8.0))
    assert padded.b.tolist() == [[6.0, 0.0, 0.0]]
    assert padded.a.tolist() == [[10.0], [0.0], [0.0]]
    assert (padded.scale, padded.rank) == (2.0, 3)


@laws
@given(seed=seeds, rank=st.integers(1, 5), own=st.floats(0.05, 32), scale=st.floats(0.05, 32))
def test_padding_keeps_the_product_and_undoes_a_cut(seed, rank, own, scale):
    tensors = adapter(5, torch.float64, seed)
    shape = ClientShape(rank=rank, lora_alpha=own * rank)
    cut = cut_to(shape, tensors, {Q.name: scale})
    padded = padded_to(5, scale, read_factors(cut, Q, shape.scale))
    torch.testing.assert_close(padded.b[:, :rank], tensors[Q.b][:, :rank], rtol=1e-14, atol=0)  # two square roots
    torch.testing.assert_close(padded.a[:rank], tensors[Q.a][:rank], rtol=1e-14, atol=0)
    assert not padded.b[:, rank:].any()
    assert not padded.a[rank:].any()
    assert padded.scale == scale


def test_a_fresh_a_is_drawn_as_peft_draws_it():
    """Uniform in +-1/sqrt(d_in): variance 1/(3 d_in). 64 x 400 draws: the sample's deviates by 0.6 %, so 3 % is five of those."""
    drawn = fresh_a(torch.Size((64, 400)), torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    assert 0.99 / math.sqrt(400) < float(drawn.abs().max()) <= 1 / math.sqrt(400)
    assert float(drawn.double().var()) == pytest.approx(1 / (3 * 400), rel=0.03)
    theirs = get_peft_model(torch.nn.ModuleDict({"q": torch.nn.Linear(400, 8)}), LoraConfig(r=64, target_modules=["q"]))
    own = get_peft_model_state_dict(theirs)["base_model.model.q.lora_A.weight"]
    assert float(own.double().var()) == pytest.approx(float(drawn.double().var()), rel=0.03)
    assert 0.99 / math.sqrt(400) < float(own.abs().max()) <= 1 / math.sqrt(400)


def test_a_fresh_a_is_its_generator_s_alone():
    shape = torch.Size((2, 3))
    torch.manual_seed(1)
    one = fresh_a(shape, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    again = fresh_a(shape, torch.Generator().manual_seed(5))
    assert torch.equal(one, again)
    assert not torch.equal(one, fresh_a(shape, torch.Generator().manual_seed(6)))


def test_a_larger_rank_is_not_padded_to_a_smaller_one():
    with pytest.raises(ValueError, match="factors of rank 3 cannot be padded to 2"):
        padded_to(2, 1.0, Factors(torch.zeros(4, 3), torch.zeros(3, 5), 1.0))
