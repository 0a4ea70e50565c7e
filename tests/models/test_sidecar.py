"""The side-car: what it adds is what the dense product in the base's weights would add, and nothing else moves."""

import gc
import weakref

import pytest
import torch
from helpers_adapters import add_dense, add_dense_beneath, apart, factors_like
from helpers_models import TARGETS, attached, some_logits, tiny_base

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import ACTIVE, live_parameters, read_tensors, write_tensors
from fedunlearn.models.lora import REFERENCE, check_trainable, hold_reference, reference_active
from fedunlearn.models.sidecar import put_sidecar, use_sidecar
from fedunlearn.records.adapter import Weights

KINDS = sorted(TARGETS)
RANKS = (3, 0, 5)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def with_sidecar(kind, dtype=torch.float32, seed=5):
    """A model whose trainable factors act, and a side-car of ragged ranks beside them."""
    model = attached(kind, dtype)
    write_tensors(model, factors_like(read_tensors(model), (4,), seed=1))
    beside = factors_like(read_tensors(model), RANKS, seed=seed)
    put_sidecar(model, beside, ACTIVE)
    return model, beside


def dense(kind, model, beside):
    """The same model without side-car, its dense product in the base's weights; alpha / r = 8 / 4 on the factors."""
    return add_dense(add_dense(tiny_base(kind), beside), read_tensors(model), scale=2.0)


class TestForward:
    def test_logits_are_those_of_the_dense_product_in_the_weights(self, kind):
        model, beside = with_sidecar(kind)
        wanted = some_logits(dense(kind, model, beside))
        assert apart(wanted, some_logits(add_dense(tiny_base(kind), read_tensors(model), scale=2.0))) > 0.05
        assert apart(some_logits(model), wanted) < 1e-5

    def test_it_acts_in_some_modules_where_it_has_some(self, kind):
        model, beside = with_sidecar(kind)
        part = {name: tensor for name, tensor in beside.items() if "c_fc" in name or "v_proj" in name}
        assert 0 < len(part) < len(beside)
        put_sidecar(model, part, ACTIVE)
        assert apart(some_logits(model), some_logits(dense(kind, model, part))) < 1e-5

    def test_an_empty_one_takes_it_away_bit_by_bit(self, kind):
        model, _ = with_sidecar(kind)
        with_it = some_logits(model)
        put_sidecar(model, {}, ACTIVE)
        plain = attached(kind)
        write_tensors(plain, read_tensors(model))
        assert torch.equal(some_logits(model), some_logits(plain))
        assert apart(with_it, some_logits(plain)) > 0.05

    def test_another_takes_its_place(self, kind):
        model, beside = with_sidecar(kind)
        before = some_logits(model)
        put_sidecar(model, factors_like(beside, (2,), seed=6), ACTIVE)
        assert apart(some_logits(model), before) > 0.01
        put_sidecar(model, beside, ACTIVE)
        assert torch.equal(some_logits(model), before)

    def test_the_values_are_copied_only_where_they_must_be_and_inputs_stay(self, kind):
        model, beside = with_sidecar(kind)
        before = {name: tensor.clone() for name, tensor in beside.items()}
        some_logits(model)
        train_a_little(model)
        assert all(torch.equal(beside[name], before[name]) for name in before)

    def test_zero_factors_add_nothing(self, kind):
        model, beside = with_sidecar(kind)
        put_sidecar(model, {name: torch.zeros_like(tensor) for name, tensor in beside.items()}, ACTIVE)
        wanted = some_logits(model)
        put_sidecar(model, {}, ACTIVE)
        assert torch.equal(some_logits(model), wanted)

    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
    def test_on_a_bfloat16_base_it_adds_the_same_to_bfloat16(self, kind, stored):
        """float32 factors on a bfloat16 base; sent as bfloat16 they are widened. Near the float32 model, and the step it makes too."""
        exact, beside = with_sidecar(kind)
        coarse, _ = with_sidecar(kind, torch.bfloat16)
        put_sidecar(coarse, {name: tensor.to(stored) for name, tensor in beside.items()}, ACTIVE)
        found, wanted = some_logits(coarse), some_logits(exact)
        assert found.dtype == torch.bfloat16
        assert apart(found.float(), wanted) < 0.05
        put_sidecar(coarse, {}, ACTIVE)
        put_sidecar(exact, {}, ACTIVE)
        moved = found.float() - some_logits(coarse).float()
        assert torch.cosine_similarity(moved.flatten(), (wanted - some_logits(exact)).flatten(), dim=0) > 0.98

    def test_under_autocast_it_runs_near_float32(self, kind):
        model, _ = with_sidecar(kind)
        wanted = some_logits(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert 1e-6 < apart(some_logits(model).float(), wanted) < 0.05


def train_a_little(model):
    """One backward and one step of SGD."""
    model(input_ids=torch.arange(8).unsqueeze(0)).logits.square().mean().backward()
    live = live_parameters(model)
    with torch.no_grad():
        for parameter in live.values():
            parameter.sub_(0.1 * parameter.grad)
    return {name: parameter.grad for name, parameter in live.items()}


class TestGradient:
    def test_it_reaches_the_trainable_factors_and_nothing_else(self, kind):
        model, beside = with_sidecar(kind)
        grads = train_a_little(model)
        assert all(grad.abs().max() > 0 for grad in grads.values())
        assert all(p.grad is None for name, p in model.named_parameters() if f".{ACTIVE}." not in name)
        assert all(tensor.grad is None and not tensor.requires_grad for tensor in beside.values())
        check_trainable(model)

    def test_it_is_that_of_the_dense_product_in_the_weights(self, kind):
        model, beside = with_sidecar(kind)
        wanted = attached(kind)
        add_dense_beneath(wanted, beside)
        write_tensors(wanted, read_tensors(model))
        found, exact = train_a_little(model), train_a_little(wanted)
        assert all(apart(found[name], exact[name]) < 1e-5 for name in exact)

    def test_it_is_no_parameter_and_in_no_state_dict(self, kind):
        model, _ = with_sidecar(kind)
        plain = attached(kind)
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
        assert list(read_tensors(model)) == list(read_tensors(plain))


class TestReference:
    def test_each_adapter_has_its_own(self, kind):
        model, mine = with_sidecar(kind)
        theirs = Weights(factors_like(mine, (4,), seed=8), factors_like(mine, (2,), seed=9))
        before = some_logits(model)
        hold_reference(model, theirs)
        assert torch.equal(some_logits(model), before)
        with reference_active(model):
            inside = some_logits(model)
        other = attached(kind)
        write_tensors(other, theirs.factors)
        assert apart(inside, some_logits(dense(kind, other, theirs.sidecar))) < 1e-5
        assert torch.equal(some_logits(model), before)

    def test_a_reference_without_one_has_none_beside_an_adapter_that_has(self, kind):
        model, mine = with_sidecar(kind)
        theirs = factors_like(mine, (4,), seed=8)
        hold_reference(model, Weights(theirs))
        with reference_active(model):
            inside = some_logits(model)
        plain = attached(kind)
        write_tensors(plain, theirs)
        assert torch.equal(inside, some_logits(plain))

    def test_a_reference_with_one_gives_none_to_an_adapter_that_has_not(self, kind):
        """Nothing was ever put beside the active adapter: the reference's must not act there."""
        model = attached(kind)
        write_tensors(model, factors_like(read_tensors(model), (4,), seed=1))
        before = some_logits(model)
        hold_reference(model, Weights(read_tensors(model), factors_like(read_tensors(model), RANKS, seed=9)))
        assert torch.equal(some_logits(model), before)
        with reference_active(model):
            assert apart(some_logits(model), before) > 0.05
        assert torch.equal(some_logits(model), before)

    def test_an_error_inside_brings_the_active_one_back(self, kind):
        model, mine = with_sidecar(kind)
        hold_reference(model, Weights(factors_like(mine, (4,), seed=8)))
        before = some_logits(model)
        with pytest.raises(RuntimeError, match="inside"), reference_active(model):
            raise RuntimeError("inside")
        assert torch.equal(some_logits(model), before)

    def test_one_can_be_used_by_name(self, kind):
        model, mine = with_sidecar(kind)
        before = some_logits(model)
        put_sidecar(model, factors_like(mine, (2,), seed=9), REFERENCE)
        assert torch.equal(some_logits(model), before)
        use_sidecar(model, REFERENCE)
        assert apart(some_logits(model), before) > 0.01
        use_sidecar(model, "nobody's")
        without = some_logits(model)
        put_sidecar(model, {}, ACTIVE)
        use_sidecar(model, ACTIVE)
        assert torch.equal(some_logits(model), without)


class TestRefused:
    def test_a_module_that_has_no_lora_layer(self, kind):
        model, beside = with_sidecar(kind)
        before = some_logits(model)
        strange = {f"base_model.model.lm_head.lora_{side}.weight": torch.zeros(1, 1) for side in "AB"}
        with pytest.raises(
            UserError, match=r"the side-car does not fit this model: 'base_model\.model\.lm_head' has no LoRA layer"
        ):
            put_sidecar(model, {**beside, **strange}, ACTIVE)
        assert torch.equal(some_logits(model), before)

    @pytest.mark.parametrize("change", ["wide", "tall", "ranks"])
    def test_factors_of_another_shape(self, kind, change):
        model, beside = with_sidecar(kind)
        before = some_logits(model)
        a = max(name for name in beside if ".lora_A." in name)
        b = a.replace(".lora_A.", ".lora_B.")
        wrong = {
            "wide": {a: torch.zeros(2, beside[a].shape[1] + 1), b: torch.zeros(beside[b].shape[0], 2)},
            "tall": {a: torch.zeros(2, beside[a].shape[1]), b: torch.zeros(beside[b].shape[0] + 1, 2)},
            "ranks": {a: torch.zeros(2, beside[a].shape[1]), b: torch.zeros(beside[b].shape[0], 3)},
        }[change]
        with pytest.raises(
            UserError,
            match=r"the side-car does not fit this model: .* has factors of shapes .*, this model wants \(R, \d+\) and \(\d+, R\)",
        ):
            put_sidecar(model, {**beside, **wrong}, ACTIVE)
        assert torch.equal(some_logits(model), before)

    def test_half_a_pair(self, kind):
        model, beside = with_sidecar(kind)
        before, name = some_logits(model), max(name for name in beside if ".lora_B." in name)
        with pytest.raises(ValueError, match="is a LoRA factor without a partner"):
            put_sidecar(model, {key: tensor for key, tensor in beside.items() if key != name}, ACTIVE)
        assert torch.equal(some_logits(model), before)


def test_it_keeps_no_model_alive(kind):
    model, _ = with_sidecar(kind)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
