"""A base without weights: the same modules and shapes as with them."""

import pytest
from helpers_architectures import CONFIGS, tiny
from peft import LoraConfig

from fedunlearn.errors import UserError
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.skeleton import skeleton


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_module_and_shape_and_tie_is_there_and_no_weight(kind):
    bare, whole = skeleton(CONFIGS[kind]), tiny(kind)
    assert [name for name, _ in bare.named_modules()] == [name for name, _ in whole.named_modules()]
    assert {n: p.shape for n, p in bare.named_parameters()} == {n: p.shape for n, p in whole.named_parameters()}
    assert {p.device.type for p in bare.parameters()} == {"meta"}


def test_a_folder_needs_its_config_alone(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    assert type(skeleton(tmp_path)) is type(tiny("llama"))


def test_each_is_the_caller_s_own():
    first = skeleton(CONFIGS["llama"])
    attach_lora(first, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert not any("lora" in name for name, _ in skeleton(CONFIGS["llama"]).named_modules())


def test_a_folder_whose_config_changes_gives_another(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    skeleton(tmp_path)
    CONFIGS["gpt2"].save_pretrained(tmp_path)
    assert type(skeleton(tmp_path)) is type(tiny("gpt2"))


@pytest.mark.parametrize(
    ("text", "match"), [(None, "has no config that can be read"), ('{"model_type": "vit"}', "no causal language model")]
)
def test_what_is_no_language_model_is_refused(tmp_path, text, match):
    if text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=match):
        skeleton(tmp_path)
