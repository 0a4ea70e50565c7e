"""LoRA on one base: attached once, frozen where it must be, swapped in place, with a reference beside it."""

import math

import pytest
import torch
from helpers_eval import tiny_llama
from helpers_models import lora_args, some_logits
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import ACTIVE, live_parameters, live_tensors, read_tensors, write_tensors
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import REFERENCE, attach_lora, check_trainable, hold_reference, reference_active
from fedunlearn.models.lora_config import lora_config_of, plain_config
from fedunlearn.records.adapter import Adapter, Weights

LOADED = Adapter({"a": torch.zeros(1)}, plain_config(lora_config_of(lora_args(), None, "some/base")), None)


def attached(dtype=torch.float32, **changed):
    """A tiny Llama with fresh LoRA layers."""
    base = tiny_llama().to(dtype).eval()
    base.name_or_path = "base"
    base.requires_grad_(False)
    model = attach_lora(base, lora_config_of(lora_args(**changed), None, "base"))
    draw_fresh(model, 0)
    return model.eval()


def random_tensors(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in read_tensors(model).items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestConfig:
    def test_the_yaml_s_values_arrive(self):
        config = lora_config_of(lora_args(use_rslora=True, lora_dropout=0.25), None, "some/base")
        assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (4, 8.0, True, 0.25)
        assert config.target_modules == {"q_proj", "v_proj"}
        assert config.base_model_name_or_path == "some/base"
        assert (config.bias, config.inference_mode) == ("none", False)

    def test_null_takes_the_loaded_adapter_s_and_dropout_is_this_run_s(self):
        args = lora_args(r=None, lora_alpha=None, target_modules=None, lora_dropout=0.5)
        config = lora_config_of(args, LOADED, "another name")
        assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8.0, 0.5)
        assert config.target_modules == {"q_proj", "v_proj"}
        assert config.base_model_name_or_path == "another name"

    def test_equal_values_in_another_order_agree(self):
        assert lora_config_of(lora_args(target_modules=("v_proj", "q_proj"), lora_alpha=8), LOADED, "x").r == 4

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("r", 8),
            ("lora_alpha", 16.0),
            ("target_modules", ("q_proj",)),
            ("target_modules", "all-linear"),
            ("use_rslora", True),
        ],
    )
    def test_a_value_that_is_not_the_loaded_adapter_s_is_refused(self, key, value):
        with pytest.raises(
            UserError, match=rf"lora_config\.{key}=.* differs from the loaded adapter's .*: set that value or null"
        ):
            lora_config_of(lora_args(**{key: value}), LOADED, "x")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("use_dora", True),
            ("init_lora_weights", "gaussian"),
            ("bias", "all"),
            ("lora_bias", True),
            ("modules_to_save", ("lm_head",)),
            ("exclude_modules", ("v_proj",)),
            ("layers_to_transform", 1),
            ("rank_pattern", {"q_proj": 2}),
            ("alpha_pattern", {"q_proj": 2.0}),
            ("target_parameters", ("mlp.experts.down_proj",)),
            ("fan_in_fan_out", True),
        ],
    )
    def test_every_other_key_is_compared_too(self, key, value):
        with pytest.raises(UserError, match=rf"lora_config\.{key}=.* differs from the loaded adapter's"):
            lora_config_of(lora_args(**{key: value}), LOADED, "x")
        with pytest.raises(UserError, match=rf"lora_config\.{key}=.* differs from the loaded adapter's"):
            lora_config_of(lora_args(target_modules=None, **{key: value}), LOADED, "x", tiny_llama())
        plain = list(value) if isinstance(value, tuple) else value
        same = Adapter(LOADED.tensors, {**LOADED.peft_config, key: plain}, "print")
        assert plain_config(lora_config_of(lora_args(**{key: value}), same, "x"))[key] == plain

    def test_two_ways_of_naming_the_same_modules_agree(self):
        """Judged on the base: words, patterns, filters and plain names."""
        base = tiny_llama()
        for changed in (
            {"target_modules": r".*\.(q|v)_proj"},
            {"target_modules": "attention", "exclude_modules": ("k_proj", "o_proj")},
            {"target_modules": ("q_proj", "v_proj"), "layers_to_transform": (0, 1)},
        ):
            config = lora_config_of(lora_args(**changed), LOADED, "x", base)
            assert config.target_modules == {"q_proj", "v_proj"}
            assert config.layers_to_transform is None
        for changed in (
            {"target_modules": "attention"},
            {"target_modules": ("q_proj", "v_proj"), "layers_to_transform": (0,)},
        ):
            with pytest.raises(UserError, match="differs from the loaded adapter's"):
                lora_config_of(lora_args(**changed), LOADED, "x", base)

    def test_a_filter_that_the_yaml_leaves_null_is_the_adapter_s(self):
        theirs = Adapter(LOADED.tensors, {**LOADED.peft_config, "layers_to_transform": [1]}, None)
        config = lora_config_of(lora_args(target_modules=r".*\.(q|v)_proj"), theirs, "x", tiny_llama())
        assert config.layers_to_transform == [1]

    def test_a_loaded_adapter_s_own_words_are_put_as_names(self):
        """all-linear of a foreign folder; what it names that this base lacks is its fault, not the yaml's."""
        theirs = Adapter(LOADED.tensors, {**LOADED.peft_config, "target_modules": "all-linear"}, None)
        config = lora_config_of(lora_args(target_modules=None), theirs, "x", tiny_llama())
        assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        other = Adapter(LOADED.tensors, {**LOADED.peft_config, "target_modules": ["c_attn"]}, None)
        with pytest.raises(UserError, match="the adapter's target_modules: 'c_attn' matches no module"):
            lora_config_of(lora_args(target_modules=None), other, "x", tiny_llama())

    def test_a_foreign_adapter_that_names_no_task_is_taken(self):
        theirs = Adapter(LOADED.tensors, plain_config(LoraConfig(r=2, target_modules=["q_proj"])), None)
        args = lora_args(r=None, lora_alpha=None, target_modules=None)
        assert theirs.peft_config["task_type"] is None
        assert lora_config_of(args, theirs, "x", tiny_llama()).r == 2

    def test_all_disagreements_are_told_at_once(self):
        with pytest.raises(UserError, match="differs") as caught:
            lora_config_of(lora_args(r=2, lora_alpha=1.0, target_modules=("o_proj",)), LOADED, "x")
        assert len(caught.value.faults) == 3

    def test_null_without_an_adapter_is_refused_key_by_key(self):
        with pytest.raises(UserError, match=r"lora_config\.r=null without an adapter to take it from") as caught:
            lora_config_of(lora_args(r=None, lora_alpha=None, target_modules=None), None, "x")
        assert len(caught.value.faults) == 3

    def test_another_kind_of_adapter_is_refused(self):
        with pytest.raises(UserError, match="peft_type='LOHA': only LORA is understood"):
            lora_config_of(lora_args(), Adapter({}, {**LOADED.peft_config, "peft_type": "LOHA"}, None), "x")

    def test_a_plain_config_holds_sorted_json_values_only(self):
        config = plain_config(LoraConfig(target_modules=["v_proj", "a", "q_proj"], task_type="CAUSAL_LM"))
        assert config["target_modules"] == ["a", "q_proj", "v_proj"]
        assert (config["task_type"], config["peft_type"]) == ("CAUSAL_LM", "LORA")
        assert type(config["task_type"]) is str
        assert list(config) == sorted(config)


class TestAttach:
    def test_a_second_wrap_is_refused(self):
        model = attached()
        with pytest.raises(
            ValueError, match="the base has an adapter already: a second wrap would train a new adapter"
        ):
            attach_lora(model.get_base_model(), lora_config_of(lora_args(), None, "base"))
        with pytest.raises(ValueError, match="a second wrap"):
            attach_lora(model, lora_config_of(lora_args(), None, "base"))

    @pytest.mark.parametrize("targets", [("qproj",), ("q_proj", "qproj"), "qproj", r".*\.qproj"])
    def test_a_target_that_matches_nothing_is_refused(self, targets):
        linear = "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"
        with pytest.raises(
            UserError, match=rf"target_modules: '.*qproj' matches no module of this base; linear ones are {linear}"
        ):
            attached(target_modules=targets)

    @pytest.mark.parametrize(
        ("targets", "count"),
        [(("q_proj",), 4), ("all-linear", 28), (r".*layers\.1.*(q|v)_proj", 4), (("layers.0.self_attn.k_proj",), 2)],
    )
    def test_targets_that_match_are_wrapped(self, targets, count):
        """Two layers, seven linear modules each, A and B; all-linear leaves the head out."""
        assert len(live_tensors(attached(target_modules=targets))) == count

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_exactly_the_adapter_trains_in_float32(self, dtype):
        model = attached(dtype, target_modules="all-linear")
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert len(trainable) == 28
        assert all(".lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
        frozen = [p for name, p in model.named_parameters() if ".lora_" not in name]
        assert all(not p.requires_grad and p.dtype == dtype for p in frozen)
        assert sum(p.numel() for p in trainable.values()) == sum(t.numel() for t in read_tensors(model).values())

    def test_an_unfrozen_base_is_our_own_fault(self):
        model = attached()
        next(p for name, p in model.named_parameters() if "norm" in name).requires_grad_(True)
        with pytest.raises(AssertionError, match="norm"):
            check_trainable(model)

    def test_the_global_random_state_and_the_config_stay(self):
        base = tiny_llama().requires_grad_(False)
        base.name_or_path = "base"
        config = lora_config_of(lora_args(target_modules="all-linear"), None, "the source's name")
        state = torch.get_rng_state()
        attach_lora(base, config)
        assert torch.equal(torch.get_rng_state(), state)
        assert config.target_modules == "all-linear"
        assert config.base_model_name_or_path == "the source's name"


class TestDrawFresh:
    def test_it_is_deterministic_and_moves_with_the_seed(self):
        model = attached()
        draws = []
        for seed in (3, 3, 4):
            write_tensors(model, random_tensors(model, 9))
            draw_fresh(model, seed)
            draws.append(read_tensors(model))
        assert same(draws[0], draws[1])
        assert not same(draws[0], draws[2])

    def test_b_is_zero_and_a_as_peft_draws_it(self):
        """Kaiming-uniform with a = sqrt 5 over 32 inputs: uniform within 1 / sqrt 32 = 0.177; the model is the bare base."""
        model = attached(target_modules=("q_proj", "v_proj", "k_proj", "o_proj"))
        for name, tensor in read_tensors(model).items():
            if "lora_B" in name:
                assert not tensor.any()
            else:
                assert 0.9 / math.sqrt(32) < tensor.abs().max() <= 1 / math.sqrt(32)
        assert torch.equal(some_logits(model), some_logits(tiny_llama().eval()))

    def test_the_global_random_state_neither_matters_nor_moves(self):
        model = attached()
        first = read_tensors(model)
        torch.manual_seed(123)
        state = torch.get_rng_state()
        draw_fresh(model, 0)
        assert torch.equal(torch.get_rng_state(), state)
        assert same(read_tensors(model), first)


class TestTensors:
    def test_names_are_those_of_peft_s_state_dict_in_name_order(self):
        model = attached(target_modules="all-linear")
        wanted = sorted(get_peft_model_state_dict(model))
        assert list(live_parameters(model)) == list(live_tensors(model)) == list(read_tensors(model)) == wanted

    def test_live_tensors_share_memory_with_the_parameters_and_read_ones_do_not(self):
        model = attached()
        live, parameters, read = live_tensors(model), live_parameters(model), read_tensors(model)
        for name, parameter in parameters.items():
            assert live[name].data_ptr() == parameter.data_ptr() != read[name].data_ptr()
            assert not read[name].requires_grad

    def test_written_values_are_read_and_act(self):
        model = attached()
        before, values = some_logits(model), random_tensors(model, 1)
        write_tensors(model, values)
        assert same(read_tensors(model), values)
        assert (some_logits(model) - before).abs().max() > 0.1
        check_trainable(model)

    def test_written_values_are_copied(self):
        model = attached()
        values = random_tensors(model, 1)
        write_tensors(model, values)
        first = read_tensors(model)
        values[next(iter(values))].zero_()
        assert same(read_tensors(model), first)

    def test_values_that_do_not_fit_are_refused(self):
        model = attached()
        values = random_tensors(model, 1)
        name, tensor = next(iter(values.items()))
        with pytest.raises(
            UserError,
            match=r"does not fit this base: tensor '.*layers\.0\.self_attn\.q_proj\.lora_A\.weight' stands on one side",
        ):
            write_tensors(model, {k: t for k, t in values.items() if k != name})
        with pytest.raises(UserError, match=r"tensor 'base_model\.other' stands on one side only"):
            write_tensors(model, {**values, "base_model.other": tensor})
        with pytest.raises(
            UserError, match=r"has shape \(8, 32\), this model wants \(4, 32\) \(another base or rank\)"
        ):
            write_tensors(model, {**values, name: torch.zeros(8, 32)})

    def test_bfloat16_values_are_written_into_float32_parameters(self):
        model = attached()
        write_tensors(model, {k: t.bfloat16() for k, t in random_tensors(model, 1).items()})
        assert {t.dtype for t in read_tensors(model).values()} == {torch.float32}


class TestReference:
    def test_it_acts_inside_the_block_alone(self):
        model = attached()
        mine, kept = random_tensors(model, 1), random_tensors(model, 2)
        write_tensors(model, kept)
        wanted = some_logits(model)
        write_tensors(model, mine)
        before = some_logits(model)
        hold_reference(model, Weights(kept))
        assert torch.equal(some_logits(model), before)
        with reference_active(model):
            assert torch.equal(some_logits(model), wanted)
        assert torch.equal(some_logits(model), before)

    def test_the_trainable_adapter_stays_trainable_and_untouched(self):
        model = attached()
        mine = random_tensors(model, 1)
        write_tensors(model, mine)
        hold_reference(model, Weights(random_tensors(model, 2)))
        with reference_active(model):
            pass
        check_trainable(model)
        assert same(read_tensors(model), mine)
        assert model.active_adapter == ACTIVE
        frozen = [p for name, p in model.named_parameters() if f".{REFERENCE}." in name]
        assert len(frozen) == 8
        assert not any(p.requires_grad for p in frozen)

    def test_a_gradient_still_reaches_the_trainable_adapter_and_no_other(self):
        model = attached()
        write_tensors(model, random_tensors(model, 1))
        hold_reference(model, Weights(random_tensors(model, 2)))
        ids = torch.arange(6).unsqueeze(0)
        with reference_active(model):
            reference = model(input_ids=ids).logits
        (model(input_ids=ids).logits - reference).square().mean().backward()
        assert not reference.requires_grad
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in live_parameters(model).values())
        assert all(p.grad is None for name, p in model.named_parameters() if f".{ACTIVE}." not in name)

    def test_held_twice_there_is_still_one_with_the_new_values(self):
        model = attached()
        for seed in (2, 3):
            hold_reference(model, Weights(random_tensors(model, seed)))
        assert set(model.peft_config) == {ACTIVE, REFERENCE}
        assert same({k: t.clone() for k, t in live_tensors(model, REFERENCE).items()}, random_tensors(model, 3))

    @pytest.mark.parametrize("training", [True, False])
    def test_dropout_is_off_inside_and_the_mode_comes_back(self, training):
        model = attached(lora_dropout=0.5)
        write_tensors(model, random_tensors(model, 1))
        hold_reference(model, Weights(random_tensors(model, 2)))
        model.train(training)
        with reference_active(model):
            assert torch.equal(some_logits(model), some_logits(model))
        assert model.training == training
        assert torch.equal(some_logits(model), some_logits(model)) != training

    def test_an_error_inside_brings_the_trainable_one_back(self):
        model = attached().train()
        hold_reference(model, Weights(random_tensors(model, 2)))
        with pytest.raises(RuntimeError, match="inside"), reference_active(model):
            raise RuntimeError("inside")
        assert model.active_adapter == ACTIVE
        assert model.training
        check_trainable(model)

    def test_no_copy_of_the_base_is_made(self):
        model = attached()
        before = {id(p) for p in model.parameters()}
        hold_reference(model, Weights(random_tensors(model, 2)))
        new = [p for p in model.parameters() if id(p) not in before]
        assert sum(p.numel() for p in new) == sum(t.numel() for t in read_tensors(model).values())
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        assert len(embeddings) == 1

    def test_a_reference_that_does_not_fit_is_refused(self):
        model = attached()
        with pytest.raises(UserError, match="stands on one side only"):
            hold_reference(model, Weights({"other": torch.zeros(1)}))

    def test_the_global_random_state_stays(self):
        model = attached()
        values = random_tensors(model, 2)
        state = torch.get_rng_state()
        hold_reference(model, Weights(values))
        assert torch.equal(torch.get_rng_state(), state)
