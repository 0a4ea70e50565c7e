"""The public functions for LoRA from Python, as a user calls them."""

import pytest
import torch
from helpers_adapters import apart
from helpers_families import FAMILIES, adapter_of, base_of, base_tensors
from helpers_models import lora_args, some_logits
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedunlearn import lora
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import save_adapter
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.merge import merged_base
from fedunlearn.records.adapter import Adapter


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in FAMILIES}
    for kind, folder in folders.items():
        base_of(kind).save_pretrained(folder)
    return folders


def standing(base):
    """Which modules and parameters there are, how they stand, and what else hangs on them."""
    modules = [
        (n, id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in base.named_modules()
    ]
    parameters = [(n, id(p), p.requires_grad, p.dtype) for n, p in base.named_parameters()]
    return modules, parameters, hasattr(base, "peft_config")


def own(kind, folder, seed=1, **lora):
    """An adapter that says it belongs on that base."""
    found = adapter_of(kind, seed, **lora)
    return Adapter(
        found.tensors, {**found.peft_config, "base_model_name_or_path": str(folder)}, fingerprint_base(folder)
    )


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_saved_gives_the_same_logits_in_plain_peft(kind, bases, tmp_path):
    model = lora.apply(loaded(bases[kind]), own(kind, bases[kind]))
    lora.save(model, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(loaded(bases[kind]), tmp_path / "adapter").eval()
    assert torch.equal(some_logits(theirs), some_logits(model))
    again = lora.apply(loaded(bases[kind]), tmp_path / "adapter")
    assert lora.adapter_of(again) == lora.adapter_of(model)


@pytest.mark.parametrize("kind", FAMILIES)
def test_merge_and_unmerge(kind, bases):
    model = lora.apply(loaded(bases[kind]), own(kind, bases[kind]))
    before, wanted = base_tensors(model), some_logits(model)
    lora.merge(model, keep_on="cpu")
    assert lora.is_merged(model)
    assert apart(some_logits(model), wanted) < 1e-5
    lora.unmerge(model)
    assert not lora.is_merged(model)
    assert all(torch.equal(t, before[n]) for n, t in base_tensors(model).items())


def test_a_step_of_training_moves_the_acting_adapter_alone(bases):
    model = lora.apply(loaded(bases["llama"]), own("llama", bases["llama"]))
    lora.apply(model, own("llama", bases["llama"], 2), name="other")
    assert lora.trainable_parameters(model) == {}
    lora.switch(model, "other")
    lora.unfreeze(model)
    trained = lora.trainable_parameters(model)
    assert trained
    assert all(".other." in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == sum(t.numel() for t in lora.state_dict(model, "other").values())
    first, before, base = lora.state_dict(model, "default"), lora.state_dict(model, "other"), base_tensors(model)
    optimiser = torch.optim.SGD(trained.values(), lr=0.1)
    model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    optimiser.step()
    after = lora.state_dict(model, "other")
    assert all(not torch.equal(after[n], t) for n, t in before.items())
    assert all(torch.equal(lora.state_dict(model, "default")[n], t) for n, t in first.items())
    assert all(torch.equal(t, base[n]) for n, t in base_tensors(model).items())
    lora.freeze(model)
    assert lora.trainable_parameters(model) == {}


def test_a_fresh_adapter_is_trainable_adds_nothing_and_saves_with_its_base_s_fingerprint(bases, tmp_path):
    base = loaded(bases["llama"])
    bare = some_logits(base)
    model = lora.begin(base, lora_args(), seed=3)
    assert torch.equal(some_logits(model), bare)
    assert lora.trainable_parameters(model)
    lora.save(model, tmp_path / "fresh")
    assert lora.load(tmp_path / "fresh").base_fingerprint == fingerprint_base(bases["llama"])
    again = lora.begin(loaded(bases["llama"]), lora_args(), seed=3)
    assert all(torch.equal(t, lora.state_dict(again)[n]) for n, t in lora.state_dict(model).items())


@pytest.mark.parametrize("initial", ["gaussian", "orthogonal", "pissa", "olora"])
def test_an_initialisation_begins_at_the_base_and_leaves_its_tensors_alone(initial, bases, tmp_path):
    base = loaded(bases["llama"])
    bare = some_logits(base)
    model = lora.begin(base, lora_args(init_lora_weights=initial, target_modules=("q_proj", "v_proj")))
    assert apart(some_logits(model), bare) < 1e-5
    with model.disable_adapter():
        assert torch.equal(some_logits(model), bare)
    with torch.no_grad():
        for parameter in lora.trainable_parameters(model).values():
            parameter.mul_(1.5)
    wanted = some_logits(model)
    lora.save(model, tmp_path / initial)
    theirs = PeftModel.from_pretrained(loaded(bases["llama"]), tmp_path / initial).eval()
    assert apart(some_logits(theirs), wanted) < 1e-5
    assert apart(some_logits(lora.apply(loaded(bases["llama"]), tmp_path / initial)), wanted) < 1e-5
    lora.merge(model)
    assert apart(some_logits(model), wanted) < 1e-5
    lora.unmerge(model)
    assert torch.equal(some_logits(model), wanted)


def test_a_base_is_as_it_was_after_an_initialisation_that_it_cannot_have(bases):
    base = loaded(bases["llama"])
    with pytest.raises(UserError, match="choose an even r"):
        lora.begin(base, lora_args(init_lora_weights="orthogonal", r=3))
    assert lora.names(lora.begin(base, lora_args())) == ("default",)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"init_lora_weights": "orthogonal", "r": 3, "modules_to_save": ("lm_head",)}, "choose an even r"),
        ({"bias": "all"}, r"bias='all' on a base in torch\.bfloat16"),
        ({"modules_to_save": ("lm_haed",)}, "'lm_haed' matches no module"),
    ],
)
def test_a_refused_beginning_leaves_a_trainable_narrow_base_as_it_was(changed, match):
    base = base_of("qwen2", torch.bfloat16).train()
    base.requires_grad_(True)
    before = standing(base)
    with pytest.raises(UserError, match=match):
        lora.begin(base, lora_args(**changed))
    assert standing(base) == before


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_saved_head_on_a_narrow_base_acts_in_float32_and_merges(kind, bases, tmp_path):
    args = lora_args(target_modules="attention", modules_to_save=("lm_head",) if kind == "llama" else ("ln_f",))
    base = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.bfloat16).eval()
    model = lora.begin(base, args)
    with torch.no_grad():
        for parameter in lora.trainable_parameters(model).values():
            parameter.add_(0.01 * torch.randn_like(parameter))
    lora.save(model, tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.bfloat16).eval()
    applied = lora.apply(fresh, tmp_path / "adapter")
    assert torch.equal(some_logits(applied), some_logits(model))
    wanted = some_logits(applied)
    plain, _ = merged_base(applied, torch.bfloat16)
    assert apart(some_logits(plain).float(), wanted.float()) < 2e-2 * wanted.abs().max()


def test_a_state_dict_goes_out_and_in(bases):
    model = lora.apply(loaded(bases["qwen3_moe"]), own("qwen3_moe", bases["qwen3_moe"]))
    tensors = lora.state_dict(model)
    assert any(".experts.3." in name for name in tensors)
    wanted = some_logits(model)
    other = lora.apply(loaded(bases["qwen3_moe"]), own("qwen3_moe", bases["qwen3_moe"], 2))
    assert not torch.equal(some_logits(other), wanted)
    lora.load_state_dict(other, tensors)
    assert torch.equal(some_logits(other), wanted)
    with pytest.raises(UserError, match="stands on one side only"):
        lora.load_state_dict(other, dict(list(tensors.items())[1:]))


def test_names_and_removal(bases):
    model = lora.apply(loaded(bases["gpt2"]), own("gpt2", bases["gpt2"]))
    lora.apply(model, own("gpt2", bases["gpt2"], 2), name="other")
    assert (lora.names(model), lora.active(model)) == (("default", "other"), {"default": 1.0})
    lora.switch(model, {"default": 0.5, "other": 0.5})
    assert lora.active(model) == {"default": 0.5, "other": 0.5}
    lora.switch(model, "other")
    lora.remove(model, "default")
    assert lora.names(model) == ("other",)


class TestAnotherBase:
    def test_by_fingerprint(self, bases, tmp_path):
        folder = tmp_path / "other"
        base_of("llama", seed=9).save_pretrained(folder)
        base = loaded(folder)
        with pytest.raises(
            UserError, match=rf"belongs to another base .*its fingerprint is {fingerprint_base(bases['llama'])}"
        ):
            lora.apply(base, own("llama", bases["llama"]))
        assert not hasattr(base, "peft_config")
        lora.apply(base, own("llama", bases["llama"]), trust_base=True)

    def test_by_name_where_there_is_no_fingerprint(self, bases):
        adapter = own("llama", bases["llama"])
        foreign = Adapter(adapter.tensors, {**adapter.peft_config, "base_model_name_or_path": "meta/other"}, None)
        with pytest.raises(UserError, match="names another base, 'meta/other', and it carries no fingerprint"):
            lora.apply(loaded(bases["llama"]), foreign)
        lora.apply(loaded(bases["llama"]), Adapter(adapter.tensors, adapter.peft_config, None))

    def test_a_base_that_came_from_nowhere(self, bases):
        with pytest.raises(UserError, match="the base's own folder is not known"):
            lora.apply(base_of("llama"), own("llama", bases["llama"]))
        lora.apply(base_of("llama"), own("llama", bases["llama"]), base_folder=bases["llama"])


def test_refusals(bases, tmp_path):
    model = lora.apply(loaded(bases["llama"]), own("llama", bases["llama"]))
    save_adapter(tmp_path / "there", adapter_of("llama"))
    with pytest.raises(UserError, match="is there already"):
        lora.save(model, tmp_path / "there")
    with pytest.raises(UserError, match="is a full model, no adapter"):
        lora.load(bases["llama"])
    with pytest.raises(UserError, match="does not exist"):
        lora.load(tmp_path / "nowhere")
    lora.merge(model)
    with pytest.raises(UserError, match="unmerge it before training"):
        lora.unfreeze(model)
    with pytest.raises(UserError, match="unmerge it before its adapters change"):
        lora.load_state_dict(model, lora.state_dict(model))
    with pytest.raises(UserError, match="no adapter 'x'"):
        lora.load_state_dict(model, {}, "x")


@pytest.mark.parametrize(
    "ask",
    [lora.names, lora.active, lora.unfreeze, lora.merge, lora.state_dict, lambda m: lora.switch(m, "x"), lambda m: lora.remove(m, "x"), lambda m: lora.load_state_dict(m, {})],
)  # fmt: skip
def test_a_base_without_an_adapter_is_told(ask, bases):
    with pytest.raises(UserError, match=r"there is no adapter on this LlamaForCausalLM: lora\.apply or lora\.begin"):
        ask(loaded(bases["llama"]))


@pytest.mark.parametrize("name", ["weight", "bias", "lora_A", "base_layer", "1st"])
def test_a_name_that_peft_has_for_tensors_is_refused_and_the_model_as_it_was(name, bases):
    model = lora.apply(loaded(bases["llama"]), own("llama", bases["llama"]))
    with pytest.raises(UserError, match=f"adapter name '{name}'"):
        lora.apply(model, own("llama", bases["llama"], 2), name=name)
    assert lora.names(model) == ("default",)


def test_an_adapter_in_memory_is_looked_at_too(bases):
    found = own("llama", bases["llama"])
    first = next(iter(found.tensors))
    broken = Adapter(
        {**found.tensors, first: found.tensors[first] * float("nan")}, found.peft_config, found.base_fingerprint
    )
    with pytest.raises(UserError, match=r"NaN|finite"):
        lora.apply(loaded(bases["llama"]), broken)
