"""Several adapters on one base: each acts as if it were alone, together they are a sum, and switching costs no memory."""

import gc
import tracemalloc
import weakref
from dataclasses import replace

import pytest
import torch
from helpers_adapters import add_dense, apart
from helpers_families import FAMILIES, TARGETS, adapter_of, base_of, base_tensors
from helpers_models import some_logits

from fedunlearn.aggregation.factors import modules_of, scales_of
from fedunlearn.errors import UserError
from fedunlearn.models.merge import merge
from fedunlearn.models.switch import acting, hold_sidecar, origin_of, put_adapter, remove_adapter, switch_to
from fedunlearn.records.adapter import Adapter


def with_all(kind, adapters):
    """One base with all of them, named a0, a1, ..."""
    model = base_of(kind)
    for number, adapter in enumerate(adapters):
        model = put_adapter(model, adapter, f"a{number}")
    return model


def alone(kind, adapter):
    return some_logits(put_adapter(base_of(kind), adapter))


def num_tensors():
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


@pytest.mark.parametrize("kind", FAMILIES)
def test_three_adapters_switched_a_hundred_times_cost_nothing_and_each_is_itself(kind):
    several = {} if kind in TARGETS else {"target_modules": ["q_proj"], "r": 2}
    adapters = [adapter_of(kind, 1), adapter_of(kind, 2, lora_alpha=3), adapter_of(kind, 3, **several)]
    if kind != "qwen3_moe":
        adapters[1] = adapter_of(kind, 2, sidecar=(2, 1))
    wanted = [alone(kind, adapter) for adapter in adapters]
    assert all(apart(wanted[i], wanted[i - 1]) > 0.01 for i in range(3))
    model = with_all(kind, adapters)
    before = base_tensors(model)
    for name in ("a1", "a2", "a0"):
        switch_to(model, {name: 1.0})
    tensors = num_tensors()
    tracemalloc.start()
    begin = tracemalloc.get_traced_memory()[0]
    for turn in range(100):
        switch_to(model, {f"a{turn % 3}": 1.0})
        if turn > 96:
            assert torch.equal(some_logits(model), wanted[turn % 3])
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - begin
    tracemalloc.stop()
    assert num_tensors() == tensors
    assert grown < 100_000
    assert all(torch.equal(t, before[n]) for n, t in base_tensors(model).items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_several_at_once_are_the_weighted_sum_in_the_base(kind):
    adapters, weights = (
        [adapter_of(kind, 1, sidecar=(3,)), adapter_of(kind, 2, lora_alpha=3, sidecar=(1, 2))],
        [0.5, -2.0],
    )
    model = with_all(kind, adapters)
    switch_to(model, {"a0": 0.5, "a1": -2.0})
    assert acting(model) == {"a0": 0.5, "a1": -2.0}
    base = base_of(kind)
    for adapter, weight in zip(adapters, weights, strict=True):
        add_dense(base, adapter.sidecar, weight)
        for m in modules_of(adapter.tensors):
            scale = scales_of(adapter.peft_config, adapter.tensors)[m.name]
            add_dense(base, {n: adapter.tensors[n] for n in (m.a, m.b)}, weight * scale)
    assert apart(some_logits(model), some_logits(base)) < 1e-5
    switch_to(model, {"a0": 1.0})
    assert torch.equal(some_logits(model), alone(kind, adapters[0]))


def test_experts_at_once():
    adapters = [adapter_of("qwen3_moe", 1), adapter_of("qwen3_moe", 2)]
    model = with_all("qwen3_moe", adapters)
    switch_to(model, {"a0": 1.0, "a1": 1.0})
    wanted = some_logits(model)
    merge(model)
    assert apart(some_logits(model), wanted) < 1e-5


@pytest.mark.parametrize(
    "order", [("saved", "plain", "other"), ("plain", "saved", "other"), ("other", "saved", "plain")]
)
def test_one_with_a_saved_head_and_one_without_share_a_base(order):
    heads = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    adapters = {
        "saved": adapter_of("llama", 1, **heads),
        "plain": adapter_of("llama", 2),
        "other": adapter_of("llama", 3, **heads),
    }
    wanted = {name: alone("llama", adapter) for name, adapter in adapters.items()}
    model = base_of("llama")
    for name in order:
        model = put_adapter(model, adapters[name], name)
    for name in (*order, *reversed(order)):
        switch_to(model, {name: 1.0})
        assert torch.equal(some_logits(model), wanted[name])
        assert origin_of(model, name) == adapters[name]
    remove_adapter(model, order[1])
    assert torch.equal(some_logits(model), wanted[order[0]])


def test_an_adapter_comes_out_as_it_went_in():
    adapter, other = adapter_of("llama", 1, sidecar=(2,)), adapter_of("llama", 2, target_modules=["o_proj"])
    model = with_all("llama", [adapter, other])
    assert origin_of(model, "a0") == adapter
    assert origin_of(model, "a1") == other


def test_a_removed_adapter_is_gone_and_the_others_stay():
    model = with_all("llama", [adapter_of("llama", 1), adapter_of("llama", 2, sidecar=(2,))])
    remove_adapter(model, "a1")
    assert list(model.peft_config) == ["a0"]
    assert not any(".a1." in name for name, _ in model.named_parameters())
    assert torch.equal(some_logits(model), alone("llama", adapter_of("llama", 1)))
    put_adapter(model, adapter_of("llama", 3), "a1")


@pytest.mark.parametrize("training", [True, False])
def test_beside_an_adapter_in_training_another_comes_frozen_and_the_training_goes_on(training):
    model = put_adapter(base_of("llama"), adapter_of("llama", target_modules=["q_proj"])).train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    put_adapter(model, adapter_of("llama", 2, sidecar=(2,)), "other")
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert {module.training for module in model.modules()} == {training}
    assert acting(model) == {"default": 1.0}
    assert torch.equal(some_logits(model), alone("llama", adapter_of("llama", target_modules=["q_proj"])))


def test_a_side_car_is_held_once_and_a_changed_one_acts_with_its_adapter_s_weight():
    first, second = adapter_of("llama", 1, sidecar=(2,)), adapter_of("llama", 2, sidecar=(3,))
    model, wanted = put_adapter(base_of("llama"), first), put_adapter(base_of("llama"), first)
    switch_to(model, {"default": 2.0})
    before = some_logits(model)
    hold_sidecar(model, "default", second.sidecar)
    hold_sidecar(wanted, "default", second.sidecar)
    switch_to(wanted, {"default": 2.0})
    assert apart(some_logits(model), before) > 0.01
    assert torch.equal(some_logits(model), some_logits(wanted))
    assert origin_of(model, "default") == replace(first, sidecar=second.sidecar)
    remove = list(first.sidecar.values())
    kept = [weakref.ref(tensor) for tensor in remove]
    del first, remove
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_beside_several_that_act_together_another_changes_nothing():
    model = with_all("llama", [adapter_of("llama", 1, sidecar=(2,), target_modules=["q_proj"]), adapter_of("llama", 2)])
    switch_to(model, {"a0": 0.5, "a1": 2.0})
    wanted = some_logits(model)
    put_adapter(model, adapter_of("llama", 3, sidecar=(3,)), "a2")
    assert torch.equal(some_logits(model), wanted)


def test_global_random_state_is_left_alone():
    base, adapter = base_of("llama"), adapter_of("llama")
    state = torch.get_rng_state()
    put_adapter(base, adapter)
    assert torch.equal(torch.get_rng_state(), state)


class TestRefused:
    @pytest.fixture
    def model(self):
        return put_adapter(base_of("llama"), adapter_of("llama"), "first")

    @pytest.mark.parametrize(
        ("weights", "said"),
        [
            ({"frist": 1.0}, "no adapter 'frist' on this base; did you mean 'first'"),
            ({}, "no adapter is named"),
            ({"first": float("nan")}, "weight nan is no finite number"),
            ({"first": float("inf")}, "no finite number"),
        ],
    )
    def test_names_and_weights(self, model, weights, said):
        with pytest.raises(UserError, match=said):
            switch_to(model, weights)
        assert acting(model) == {"first": 1.0}

    @pytest.mark.parametrize("name", ["first", "a", "two words", "", "1st", "x.y"])
    def test_names_of_adapters(self, model, name):
        with pytest.raises(UserError, match=r"adapter name|already"):
            put_adapter(model, adapter_of("llama"), name)

    def test_magnitudes_are_no_sum(self, model):
        put_adapter(model, adapter_of("llama", use_dora=True), "dora")
        switch_to(model, {"dora": 1.0})
        for weights in ({"first": 1.0, "dora": 1.0}, {"dora": 0.5}):
            with pytest.raises(UserError, match="use_dora=True, which is no sum: let it act alone"):
                switch_to(model, weights)

    def test_trained_biases_share_no_base(self, model):
        with pytest.raises(UserError, match="bias='lora_only': such an adapter changes the base's own biases"):
            put_adapter(model, adapter_of("llama", bias="lora_only"), "biased")

    def test_a_merged_model(self, model):
        put_adapter(model, adapter_of("llama", 2), "second")
        merge(model)
        with pytest.raises(UserError, match="unmerge it before switching"):
            switch_to(model, {"second": 1.0})
        with pytest.raises(UserError, match="unmerge it before another"):
            put_adapter(model, adapter_of("llama", 3), "third")

    def test_what_acts_is_not_removed(self, model):
        with pytest.raises(UserError, match="'first' acts: switch to another"):
            remove_adapter(model, "first")

    @pytest.mark.parametrize(
        "variant",
        [
            {"alora_invocation_tokens": [40]},
            {"use_qalora": True, "qalora_group_size": 16},
            {"layer_replication": [[0, 2], [1, 2]]},
            {"trainable_token_indices": [1]},
        ],
    )
    def test_an_adapter_that_does_more_than_a_product(self, variant):
        """Merged it would be another one."""
        adapter, base = adapter_of("llama"), base_of("llama")
        with pytest.raises(UserError, match=rf"{next(iter(variant))}=.* is a variant that is not understood here"):
            put_adapter(base, Adapter(adapter.tensors, {**adapter.peft_config, **variant}, None))
        put_adapter(base, adapter)

    @pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
    def test_an_adapter_for_a_changed_base(self, init):
        """PEFT would rewrite the base once more."""
        adapter = adapter_of("llama")
        config = {**adapter.peft_config, "init_lora_weights": init}
        with pytest.raises(UserError, match=rf"init_lora_weights='{init}' changed its base's weights, .*: export it"):
            put_adapter(base_of("llama"), Adapter(adapter.tensors, config, None))

    @pytest.mark.parametrize("first", [True, False])
    def test_what_does_not_fit_leaves_the_model_as_it_was(self, first):
        wide = adapter_of("llama", r=2)
        odd = Adapter(wide.tensors, {**wide.peft_config, "r": 3}, None)
        model = base_of("llama") if first else put_adapter(base_of("llama"), adapter_of("llama"))
        names, wanted = [n for n, _ in model.named_parameters()], some_logits(model)
        with pytest.raises(UserError, match=r"has shape .* this model wants"):
            put_adapter(model, odd, "odd")
        assert [n for n, _ in model.named_parameters()] == names
        assert torch.equal(some_logits(model), wanted)
        put_adapter(model, wide, "even")

    @pytest.mark.parametrize("first", [True, False])
    def test_targets_of_which_peft_refuses_one_leave_nothing_of_the_others(self, first):
        """PEFT raises when it comes to the norm, behind the projections of the first layer."""
        norms = adapter_of("llama", r=2, target_modules=["q_proj"])
        odd = Adapter(norms.tensors, {**norms.peft_config, "target_modules": ["q_proj", "input_layernorm"]}, None)
        model = base_of("llama")
        model = model if first else put_adapter(model, adapter_of("llama", target_modules=["v_proj"]))
        names, wanted = [n for n, _ in model.named_modules()], some_logits(model)
        with pytest.raises(UserError, match="does not fit this base: Target module LlamaRMSNorm"):
            put_adapter(model, odd, "odd")
        assert [n for n, _ in model.named_modules()] == names
        assert hasattr(model, "peft_config") is not first
        assert torch.equal(some_logits(model), wanted)
        made = put_adapter(model, norms, "odd")
        switch_to(made, {"odd": 1.0})
        assert torch.equal(some_logits(made), alone("llama", norms))

    def test_a_side_car_that_does_not_fit_leaves_layers_that_take_the_next_one(self):
        good = adapter_of("llama", 2, sidecar=(2,), target_modules=["q_proj"])
        odd = Adapter(good.tensors, good.peft_config, None, {n: t[:, 1:] if "lora_A" in n else t for n, t in good.sidecar.items()})  # fmt: skip
        model = put_adapter(base_of("llama"), adapter_of("llama", target_modules=["v_proj"], sidecar=(1,)))
        with pytest.raises(UserError, match="the side-car does not fit this model"):
            put_adapter(model, odd, "other")
        put_adapter(model, good, "other")
        switch_to(model, {"other": 1.0})
        assert torch.equal(some_logits(model), alone("llama", good))

    def test_a_saved_head_of_a_refused_adapter_does_not_take_the_base_s_place(self):
        base = base_of("llama", torch.bfloat16).train().requires_grad_(True)
        head, adapter = base.lm_head, adapter_of("llama", modules_to_save=["lm_head"], target_modules=["q_proj"])
        lacking = {n: t for n, t in adapter.tensors.items() if "lm_head" not in n}
        with pytest.raises(UserError, match=r"lm_head.* stands on one side only"):
            put_adapter(base, Adapter(lacking, adapter.peft_config, None))
        assert base.lm_head is head
        assert head.weight.dtype == torch.bfloat16
        assert not head._forward_hooks
        assert base.training
        assert all(parameter.requires_grad for parameter in base.parameters())

    def test_targets_of_another_architecture(self):
        model = base_of("gpt2")
        with pytest.raises(UserError, match=r"does not fit this base: .*q_proj"):
            put_adapter(model, adapter_of("llama"))
        put_adapter(model, adapter_of("gpt2"))

    def test_another_kind_of_adapter(self):
        adapter = adapter_of("llama")
        with pytest.raises(UserError, match="peft_type='IA3': only LORA is understood"):
            put_adapter(base_of("llama"), Adapter(adapter.tensors, {**adapter.peft_config, "peft_type": "IA3"}, None))
