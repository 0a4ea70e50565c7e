"""Every key that PEFT's LoraConfig has: changed and seen in what is built, or refused by name. A key that PEFT grows fails here."""

from dataclasses import fields

import pytest
from helpers_architectures import CONFIGS, full, tiny
from helpers_models import lora_args
from peft import AdaLoraConfig, LoraConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper

from fedunlearn.config.lora import REFUSED, LoraArgs
from fedunlearn.config.reading import Reader
from fedunlearn.errors import UserError
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.lora_config import lora_config_of
from fedunlearn.models.skeleton import skeleton

THEIRS = [field.name for field in fields(LoraConfig)]
ADALORA = {field.name for field in fields(AdaLoraConfig)}
OURS = {field.name for field in fields(LoraArgs)}
AT = "model.model_args.lora_config"


def made(kind="phi", **changed):
    """Attached as a run does it; phi's layers have biases, which some keys want."""
    args = lora_args(**changed)
    return attach_lora(tiny(kind), lora_config_of(args, None, "base", skeleton(CONFIGS[kind])))


def layers(model):
    return {path: layer for path, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}


def each(model, read):
    return {read(layer) for layer in layers(model).values()}


def names(model):
    return set(layers(model))


def trained(model, end):
    return sorted(name for name, p in model.named_parameters() if p.requires_grad and name.endswith(end))


QV = ("self_attn.q_proj", "self_attn.v_proj")
SEEN = {
    "r": ({"r": 3}, lambda m: each(m, lambda layer: layer.lora_A["default"].weight.shape[0]) == {3}),
    "lora_alpha": ({"lora_alpha": 2.0}, lambda m: each(m, lambda layer: layer.scaling["default"]) == {0.5}),
    "target_modules": ({"target_modules": ("fc1",)}, lambda m: names(m) == full("phi", ("mlp.fc1",))),
    "lora_dropout": (
        {"lora_dropout": 0.25},
        lambda m: each(m, lambda layer: getattr(layer.lora_dropout["default"], "p", 0)) == {0.25},
    ),
    "use_rslora": ({"use_rslora": True}, lambda m: each(m, lambda layer: layer.scaling["default"]) == {8.0 / 4**0.5}),
    "use_dora": ({"use_dora": True}, lambda m: len(trained(m, ".lora_magnitude_vector.default.weight")) == 4),
    "init_lora_weights": (
        {"init_lora_weights": "gaussian"},
        lambda m: m.peft_config["default"].init_lora_weights == "gaussian",
    ),
    "bias": ({"bias": "lora_only"}, lambda m: len(trained(m, "_proj.base_layer.bias")) == 4),
    "lora_bias": ({"lora_bias": True}, lambda m: len(trained(m, ".lora_B.default.bias")) == 4),
    "modules_to_save": (
        {"modules_to_save": ("lm_head",)},
        lambda m: isinstance(m.get_base_model().lm_head, ModulesToSaveWrapper) and len(trained(m, "default.bias")) == 1,
    ),
    "exclude_modules": ({"exclude_modules": ("v_proj",)}, lambda m: names(m) == full("phi", QV[:1])),
    "layers_to_transform": ({"layers_to_transform": 1}, lambda m: names(m) == full("phi", QV, (1,))),
    "layers_pattern": (
        {"layers_to_transform": (0,), "layers_pattern": "layers"},
        lambda m: names(m) == full("phi", QV, (0,)) and m.peft_config["default"].layers_pattern == "layers",
    ),
    "rank_pattern": (
        {"rank_pattern": {"q_proj": 2}},
        lambda m: each(m, lambda layer: layer.r["default"]) == {2, 4},
    ),
    "alpha_pattern": (
        {"alpha_pattern": {"q_proj": 2.0}},
        lambda m: each(m, lambda layer: layer.scaling["default"]) == {0.5, 2.0},
    ),
    "target_parameters": (
        {"kind": "mixtral", "target_parameters": ("mlp.experts.down_proj",)},
        lambda m: {x.parameter_name for x in layers(m).values() if isinstance(x, ParamWrapper)} == {"down_proj"},
    ),
    "fan_in_fan_out": (
        {"kind": "gpt2", "target_modules": ("c_attn",), "fan_in_fan_out": True},
        lambda m: each(m, lambda layer: layer.fan_in_fan_out) == {True},
    ),
}
"""Key -> what is changed, and how it is seen. The values of init_lora_weights are drawn later, by models.initial from this config."""


@pytest.mark.parametrize("key", THEIRS)
def test_each_of_peft_s_keys_is_ours_or_refused(key):
    assert (key in OURS) != (key in REFUSED)
    assert key in REFUSED or key in SEEN or key in ("task_type", "peft_type")


def test_ours_are_peft_s_but_for_the_preset():
    """AdaLoRA's own: tests/models/test_adalora.py."""
    assert OURS - set(THEIRS) - ADALORA == {"preset", "adapts"}
    assert not set(REFUSED) - set(THEIRS) - ADALORA


@pytest.mark.parametrize("key", SEEN)
def test_each_of_ours_is_seen_in_what_is_built(key):
    """And not there where it is not changed."""
    changed, seen = SEEN[key]
    assert seen(made(**changed))
    if key != "fan_in_fan_out":
        left = {name: value for name, value in changed.items() if name == "kind"}
        assert not seen(made(**left))


def test_the_kind_is_one_of_two():
    assert read(peft_type="LORA") == []
    assert read(peft_type="IA3") == [f"{AT}.peft_type='IA3' does not fit; allowed: LORA, ADALORA or null"]


def test_the_task_is_the_one_there_is():
    assert isinstance(made(), PeftModelForCausalLM)
    assert read(task_type="SEQ_CLS") == [f"{AT}.task_type='SEQ_CLS' does not fit; allowed: CAUSAL_LM"]


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_refusal_says_why_and_what_to_do(key):
    (fault,) = read(**{key: 1})
    assert fault == f"{AT}.{key}=1 is refused: {REFUSED[key]}"
    assert ": " in REFUSED[key] or "; quantise by" in REFUSED[key] or REFUSED[key].startswith("give ")


def read(**changed):
    """The faults of reading it from a YAML."""
    reader = Reader({LoraArgs: REFUSED})
    reader.record(LoraArgs, {"r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj"], **changed}, AT)
    return reader.faults


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"r": 0}, r"r=0 is no rank"),
        ({"r": -4}, r"r=-4 is no rank"),
        ({"lora_alpha": 0}, r"lora_alpha=0\.0 must lie between"),
        ({"lora_alpha": -1}, r"lora_alpha=-1\.0 must lie between"),
        ({"lora_dropout": 1}, r"lora_dropout=1\.0 must lie in \[0, 1\)"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0 is no rank"),
        ({"alpha_pattern": {"q": 0}}, r"alpha_pattern\['q'\]=0\.0 must lie"),
        ({"target_modules": []}, r"target_modules=\[\] must name each module once, and at least one"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias=true beside use_dora=true"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "beside .*init_lora_weights='gaussian'"),
        ({"layers_pattern": "h"}, "layers_pattern='h' beside layers_to_transform=null"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva' is not understood"),
    ],
)
def test_values_that_mean_nothing_are_refused(changed, match):
    faults = read(**changed)
    assert len(faults) == 1
    with pytest.raises(UserError, match=match):
        raise UserError(*faults)
