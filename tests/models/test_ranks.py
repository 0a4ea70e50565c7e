"""A client's own rank in the one adapter of the model: padding, cutting and the scale that acts."""

import pytest
import torch
from helpers_adapters import add_dense, apart, factors_like
from helpers_models import TARGETS, attached, lora_args, some_logits, tiny_base
from peft.tuners.lora import LoraLayer

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import read_tensors, write_tensors
from fedunlearn.models.lora import REFERENCE, attach_lora, hold_reference, reference_active
from fedunlearn.models.lora_config import lora_config_of
from fedunlearn.models.ranks import cut, padded, scaled_for, scales_in
from fedunlearn.records.adapter import Weights
from fedunlearn.records.shape import ClientShape

TWO = ClientShape(rank=2, lora_alpha=6.0)


@pytest.fixture(params=sorted(TARGETS))
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    """Rank 4, alpha 8."""
    return attached(kind)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestPadded:
    def test_by_hand(self, model):
        """A gets zero rows below its two, B zero columns right of its two; the model's rank is 4."""
        small = factors_like(read_tensors(model), (2,))
        wide = padded(model, small)
        for name, tensor in wide.items():
            kept, zeros = (tensor[:2], tensor[2:]) if ".lora_A." in name else (tensor[:, :2], tensor[:, 2:])
            assert tensor.shape == read_tensors(model)[name].shape
            assert torch.equal(kept, small[name])
            assert not zeros.any()

    def test_what_fits_comes_back_as_it_is(self, model):
        whole = factors_like(read_tensors(model), (4,))
        assert all(tensor is whole[name] for name, tensor in padded(model, whole).items())

    def test_cut_again_it_is_what_it_was(self, model):
        small = factors_like(read_tensors(model), (3,))
        assert same(cut(padded(model, small), 3), small)

    @pytest.mark.parametrize("change", ["lacks", "extra", "larger rank", "narrow", "short", "flat", "no row, and long"])
    def test_what_does_not_fit_is_left_for_write_tensors_to_refuse(self, model, change):
        """Nothing is filled in from the model, which may hold another client's values, and only the rank is padded."""
        small = factors_like(read_tensors(model), (2,))
        a, b = (max(name for name in small if f".lora_{side}." in name) for side in "AB")
        wrong = {
            "lacks": {name: tensor for name, tensor in small.items() if name != a},
            "extra": {**small, "base_model.other": torch.zeros(1, 1)},
            "larger rank": {**small, a: torch.zeros(5, small[a].shape[1]), b: torch.zeros(small[b].shape[0], 5)},
            "narrow": {**small, a: small[a][:, 1:]},
            "short": {**small, b: small[b][1:]},
            "flat": {**small, b: small[b].flatten()},
            "no row, and long": {**small, a: torch.zeros(0, 10**13)},  # no bytes; with four rows 160 TB
        }[change]
        before = read_tensors(model)
        with pytest.raises(UserError, match="does not fit"):
            write_tensors(model, padded(model, wrong))
        assert same(read_tensors(model), before)


class TestCut:
    def test_it_gives_the_first_rows_of_a_and_columns_of_b(self):
        a, b = torch.arange(12.0).reshape(4, 3), torch.arange(8.0).reshape(2, 4)
        found = cut({"m.lora_A.weight": a, "m.lora_B.weight": b}, 2)
        assert found["m.lora_A.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert found["m.lora_B.weight"].tolist() == [[0, 1], [4, 5]]
        assert all(tensor.is_contiguous() for tensor in found.values())

    def test_a_rank_that_is_there_changes_nothing(self, model):
        whole = read_tensors(model)
        assert same(cut(whole, 4), whole)


class TestScale:
    def test_the_forward_of_a_padded_client_is_that_of_its_own_model(self, kind, model):
        """Rank 2 at alpha 6 by itself, and padded into rank 4 at alpha 8 with the scale 3 for 2."""
        small = attached(kind, r=2, lora_alpha=6.0)
        values = factors_like(read_tensors(small), (2,))
        write_tensors(small, values)
        write_tensors(model, padded(model, values))
        with scaled_for(model, TWO):
            assert apart(some_logits(model), some_logits(small)) < 1e-6
        assert apart(some_logits(model), some_logits(small)) > 1e-2

    def test_inside_it_is_the_client_s_and_afterwards_the_model_s(self, model):
        assert set(scales_in(model).values()) == {2.0}
        with scaled_for(model, TWO):
            assert set(scales_in(model).values()) == {3.0}
        assert set(scales_in(model).values()) == {2.0}

    def test_none_leaves_it(self, model):
        with scaled_for(model, None):
            assert set(scales_in(model).values()) == {2.0}

    def test_rslora_divides_by_the_root(self, kind):
        model = attached(kind, use_rslora=True)
        assert set(scales_in(model).values()) == {4.0}
        with scaled_for(model, ClientShape(rank=2, lora_alpha=6.0, use_rslora=True)):
            assert set(scales_in(model).values()) == {6.0 / 2**0.5}

    def test_an_error_inside_brings_the_model_s_back(self, model):
        with pytest.raises(RuntimeError, match="inside"), scaled_for(model, TWO):
            raise RuntimeError("inside")
        assert set(scales_in(model).values()) == {2.0}

    def test_the_reference_acts_with_it_too(self, model):
        """The same values on both sides give the same logits, inside and outside."""
        values = factors_like(read_tensors(model), (4,))
        write_tensors(model, values)
        hold_reference(model, Weights(values))
        for shape in (TWO, None):
            with scaled_for(model, shape):
                mine = some_logits(model)
                with reference_active(model):
                    assert torch.equal(some_logits(model), mine)
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        assert {layer.scaling[REFERENCE] for layer in layers} == {2.0}

    def test_modules_with_scales_of_their_own_get_them_back(self, kind):
        name = TARGETS[kind][0]
        config = lora_config_of(lora_args(target_modules=TARGETS[kind]), None, "base")
        config.alpha_pattern = {name: 16}
        model = attach_lora(tiny_base(kind), config)
        values = factors_like(read_tensors(model), (4,))
        write_tensors(model, values)
        scales = scales_in(model)
        assert set(scales.values()) == {2.0, 4.0}
        with scaled_for(model, TWO):
            assert apart(some_logits(model), some_logits(add_dense(tiny_base(kind), values, 3.0))) < 1e-5
        assert scales_in(model) == scales
