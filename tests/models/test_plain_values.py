"""What an adapter has beside factors: magnitudes, biases, saved modules; trained alone, held apart for the reference, given back to the base."""

import gc
import weakref

import pytest
import torch
from helpers_adapters import apart, live_gradients
from helpers_models import TARGETS, attached, some_logits, tiny_base
from peft import PeftModel

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import (
    ACTIVE,
    live_parameters,
    live_tensors,
    read_tensors,
    write_tensors,
)
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import REFERENCE, check_trainable, hold_reference, reference_active, training_only
from fedunlearn.records.adapter import Weights
from fedunlearn.records.rounds import Trained

VARIANTS = {
    "dora": ("llama", {"use_dora": True}),
    "all biases": ("gpt2", {"bias": "all"}),
    "targets' biases": ("gpt2", {"bias": "lora_only"}),
    "lora's biases": ("llama", {"lora_bias": True}),
    "head": ("llama", {"modules_to_save": ("lm_head",)}),
    "much": ("gpt2", {"bias": "lora_only", "lora_bias": True, "modules_to_save": ("ln_f",)}),
}


@pytest.fixture(params=sorted(VARIANTS))
def model(request):
    kind, lora = VARIANTS[request.param]
    return attached(kind, **lora)


def moved(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in read_tensors(model).items()}


def frozen_of(model):
    """Every parameter of the base that the adapter does not train."""
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if not p.requires_grad and REFERENCE not in name
    }


def backward(model):
    model(input_ids=torch.arange(8).unsqueeze(0)).logits.square().mean().backward()


def test_exactly_the_adapter_is_trained_in_float32(model):
    check_trainable(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    live = live_parameters(model)
    assert {id(p) for p in live.values()} == {id(p) for p in trained}
    assert live.keys() == live_tensors(model).keys()
    assert all(p.dtype == torch.float32 for p in trained)


def test_a_step_moves_all_of_it_and_nothing_else(model):
    write_tensors(model, moved(model, 1))
    before, frozen = read_tensors(model), frozen_of(model)
    backward(model)
    assert live_gradients(model).keys() == before.keys()
    with torch.no_grad():
        for parameter in live_parameters(model).values():
            parameter.sub_(0.01 * parameter.grad)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in read_tensors(model).items())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_drawn_anew_it_is_the_base_again(model, request):
    kind = VARIANTS[request.node.callspec.params["model"]][0]
    write_tensors(model, moved(model, 1))
    assert apart(some_logits(model), some_logits(tiny_base(kind))) > 1e-3
    draw_fresh(model, 0)
    assert apart(some_logits(model), some_logits(tiny_base(kind))) < 1e-6


def test_the_reference_says_what_its_own_adapter_says(model, request):
    kind, lora = VARIANTS[request.node.callspec.params["model"]]
    mine, theirs = moved(model, 1), moved(model, 2)
    write_tensors(model, mine)
    before, frozen = some_logits(model), frozen_of(model)
    hold_reference(model, Weights(theirs))
    assert torch.equal(some_logits(model), before)
    other = attached(kind, **lora)
    write_tensors(other, theirs)
    for _ in range(2):
        with reference_active(model):
            assert torch.equal(some_logits(model), some_logits(other))
        assert torch.equal(some_logits(model), before)
    assert all(torch.equal(tensor, mine[name]) for name, tensor in read_tensors(model).items())
    held = live_tensors(model, REFERENCE)
    assert held.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in held.items())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    check_trainable(model)


def test_a_graph_made_before_the_reference_acts_keeps_its_gradients(model):
    """Biases change places while the graph of an earlier forward is alive: a layer norm's backward reads its own."""
    write_tensors(model, moved(model, 1))
    backward(model)
    wanted = {name: gradient.clone() for name, gradient in live_gradients(model).items()}
    model.zero_grad()
    hold_reference(model, Weights(moved(model, 2)))
    loss = model(input_ids=torch.arange(8).unsqueeze(0)).logits.square().mean()
    with reference_active(model):
        some_logits(model)
    loss.backward()
    assert all(torch.allclose(gradient, wanted[name]) for name, gradient in live_gradients(model).items())


@pytest.mark.parametrize("trained", [Trained.A, Trained.B])
def test_a_mask_rests_one_factor_and_nothing_plain(model, trained):
    hold_reference(model, Weights(moved(model, 2)))
    with training_only(model, trained):
        with reference_active(model):
            some_logits(model)
        free = {name for name, p in live_parameters(model).items() if p.requires_grad}
    assert free == {name for name in live_tensors(model) if trained.covers(name)}
    check_trainable(model)


def test_plain_peft_says_the_same_of_what_is_saved(model, request, tmp_path):
    kind, _ = VARIANTS[request.node.callspec.params["model"]]
    write_tensors(model, moved(model, 1))
    model.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(tiny_base(kind), tmp_path).eval()
    assert apart(some_logits(theirs), some_logits(model)) < 1e-6


class TestSavedModules:
    def test_on_a_bfloat16_base_the_copy_is_float32_and_the_base_s_at_first(self):
        model = attached("llama", torch.bfloat16, modules_to_save=("lm_head", "embed_tokens"))
        base = tiny_base("llama", torch.bfloat16)
        live = live_tensors(model)
        assert live["base_model.model.lm_head.weight"].dtype == torch.float32
        assert torch.equal(live["base_model.model.lm_head.weight"].bfloat16(), base.lm_head.weight)
        assert some_logits(model).dtype == torch.bfloat16
        assert apart(some_logits(model).float(), some_logits(base).float()) < 0.02
        hold_reference(model, Weights(moved(model, 2)))
        with reference_active(model):
            assert some_logits(model).dtype == torch.bfloat16
        backward(model)
        assert live_gradients(model).keys() == live.keys()

    def test_a_name_that_matches_nothing_is_refused(self):
        with pytest.raises(UserError, match=r"modules_to_save: 'score' matches no module of this base"):
            attached("llama", modules_to_save=("lm_head", "score"))

    def test_modules_of_modules_on_a_bfloat16_base_are_refused(self):
        with pytest.raises(
            UserError,
            match=r"modules_to_save: .*mlp' holds other modules.*name single layers, or set torch_dtype=float32",
        ):
            attached("llama", torch.bfloat16, target_modules=("q_proj",), modules_to_save=("mlp",))


class TestBiases:
    @pytest.mark.parametrize("asked", ["all", "lora_only"])
    def test_a_base_without_any_is_refused(self, asked):
        with pytest.raises(
            UserError,
            match=rf"bias='{asked}': this base has no bias there, nothing more would be trained; set it to none",
        ):
            attached("llama", bias=asked)

    def test_a_base_in_bfloat16_is_refused(self):
        with pytest.raises(
            UserError, match=r"bias='all' on a base in torch\.bfloat16: .*set torch_dtype=float32, or bias=none"
        ):
            attached("gpt2", torch.bfloat16, bias="all")

    def test_one_that_a_saved_module_has_too_is_refused(self):
        with pytest.raises(
            UserError, match=r"bias='all' beside modules_to_save=\['transformer.ln_f'\], whose bias is trained with it"
        ):
            attached("gpt2", bias="all", modules_to_save=("ln_f",))

    def test_which_are_trained(self):
        every, targets = live_tensors(attached("gpt2", bias="all")), live_tensors(attached("gpt2", bias="lora_only"))
        assert sum(name.endswith(".bias") for name in every) == 2 * 6 + 1
        assert sum(name.endswith(".base_layer.bias") for name in targets) == 2 * len(("attn", "proj", "fc", "proj"))
        assert TARGETS["gpt2"] == ("c_attn", "c_proj", "c_fc")


def test_values_of_another_variant_do_not_fit():
    plain, dora = attached("llama"), attached("llama", use_dora=True)
    with pytest.raises(UserError, match=r"tensor '.*lora_magnitude_vector' stands on one side only"):
        write_tensors(plain, read_tensors(dora))
    saved = attached("llama", modules_to_save=("lm_head",))
    with pytest.raises(UserError, match=r"tensor 'base_model\.model\.lm_head\.weight' stands on one side only"):
        write_tensors(saved, read_tensors(plain))
    assert ACTIVE in saved.peft_config


def test_what_is_remembered_of_the_base_keeps_no_model_alive():
    model = attached("gpt2", bias="all")
    hold_reference(model, Weights(moved(model, 2)))
    draw_fresh(model, 0, "pissa")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
