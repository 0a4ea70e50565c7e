"""What can be no adapter, fault by fault: told in one error where a folder is read, before anything computes with it."""

import json

import pytest
import torch
from helpers_families import adapter_of

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import load_adapter, read_folder, save_adapter
from fedunlearn.models.soundness import check_sound, faults_of_form, faults_of_numbers
from fedunlearn.records.adapter import A, Adapter, B

FIRST = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def sound():
    return adapter_of("llama")


def without(adapter, *keys, **changed):
    config = {key: value for key, value in adapter.peft_config.items() if key not in keys}
    return Adapter(adapter.tensors, {**config, **changed}, adapter.base_fingerprint)


def holding(adapter, *names, **changed):
    """With these tensors of another value (by the end of their names), and without `names`."""
    tensors = {name: t for name, t in adapter.tensors.items() if name not in names}
    return Adapter({**tensors, **changed}, adapter.peft_config, adapter.base_fingerprint)


def refused(adapter):
    with pytest.raises(UserError) as caught:
        check_sound(adapter, "here")
    assert all(fault.startswith("adapter 'here': ") for fault in caught.value.faults)
    return caught.value.faults


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("gpt2", {}),
        ("qwen3_moe", {}),
        ("llama", {"use_dora": True}),
        ("llama", {"lora_bias": True, "bias": "none"}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 0.5}, "use_rslora": True}),
    ],
)
def test_what_is_sound_passes(kind, lora, tmp_path):
    adapter = adapter_of(kind, **lora)
    save_adapter(tmp_path / "a", adapter)
    assert load_adapter(tmp_path / "a")[0] == adapter


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"r": "16"}, "r='16', which is no rank: a whole number from 1"),
        ({"r": -1}, "r=-1, which is no rank"),
        ({"r": 0}, "r=0, which is no rank"),
        ({"r": 4.0}, "r=4.0, which is no rank"),
        ({"r": True}, "r=True, which is no rank"),
        ({"r": None}, "r=None, which is no rank"),
        ({"lora_alpha": None}, "lora_alpha=None, which is no scale: a finite number above 0"),
        ({"lora_alpha": 0}, "lora_alpha=0, which is no scale"),
        ({"lora_alpha": "8"}, "lora_alpha='8', which is no scale"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan, which is no scale"),
        ({"lora_alpha": 10**400}, "which is no scale"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0, which is no rank"),
        ({"rank_pattern": [1]}, "rank_pattern=[1], which is no mapping"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern['q_proj']=-1, which is no scale"),
        ({"use_rslora": "false"}, "use_rslora='false': true or false"),
        ({"use_dora": True}, f"use_dora=true, but '{FIRST}' has no magnitude (14 pairs have none)"),
        ({"r": 8}, f"tensor '{FIRST}{A}' has rank 4 (14 pairs do not fit), and adapter_config.json has r=8"),
        ({"peft_type": "BANANA"}, "has peft_type='BANANA': only LORA is understood"),
        ({"peft_type": None}, "has peft_type=None: only LORA is understood"),
        ({"peft_type": "ADALORA"}, "a checkpoint of AdaLoRA (or a foreign adapter of that kind) holds all ranks"),
        ({"target_parameters": 5}, "target_parameters=5: a list of names, or null"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head': a list of names, or null"),
        ({"modules_to_save": ["lm_head", "norm"]}, "no tensor of 'lm_head' is there: copy the folder again"),
    ],
)
def test_a_config_that_is_none(sound, changed, said):
    (fault,) = refused(without(sound, **changed))
    assert said in fault


@pytest.mark.parametrize("key", ["r", "lora_alpha", "peft_type"])
def test_a_key_that_is_missing(sound, key):
    (fault,) = refused(without(sound, key))
    assert f"adapter_config.json lacks {key}" in fault


class TestTensors:
    def test_a_factor_without_its_partner(self, sound):
        (fault,) = refused(holding(sound, FIRST + B))
        assert f"tensor '{FIRST}{A}' lacks its partner '{FIRST}{B}' (1 factors do)" in fault
        (fault,) = refused(holding(sound, FIRST + A))
        assert f"tensor '{FIRST}{B}' lacks its partner '{FIRST}{A}'" in fault

    def test_no_pair_at_all(self, sound):
        (fault,) = refused(Adapter({"x": torch.ones(3)}, sound.peft_config, None))
        assert "no pair of LoRA factors" in fault
        assert "(first: 'x')" in fault

    def test_ranks_that_differ_within_a_pair(self, sound):
        (fault,) = refused(holding(sound, **{FIRST + B: torch.ones(32, 3)}))
        assert f"tensors '{FIRST}{A}' and '{FIRST}{B}' have ranks 4 and 3" in fault

    def test_a_factor_that_is_no_matrix(self, sound):
        (fault,) = refused(holding(sound, **{FIRST + B: torch.ones(32)}))
        assert f"tensor '{FIRST}{B}' has shape (32,), no matrix" in fault

    def test_whole_numbers(self, sound):
        (fault,) = refused(Adapter({n: t.to(torch.int8) for n, t in sound.tensors.items()}, sound.peft_config, None))
        assert "is torch.int8 (28 of 28 tensors): an adapter's tensors are floating point" in fault

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_entry_that_is_not_finite(self, sound, value, dtype):
        odd = sound.tensors[FIRST + B].clone().to(dtype)
        odd[-1, -1] = value
        (fault,) = refused(holding(sound, **{FIRST + B: odd}))
        assert f"tensor '{FIRST}{B}' holds NaN or infinity (1 of 28 tensors)" in fault

    def test_magnitudes_that_nobody_asked_for(self):
        (fault,) = refused(without(adapter_of("llama", use_dora=True), use_dora=False))
        assert "is a magnitude of DoRA, and adapter_config.json has use_dora=False" in fault


def test_all_faults_are_told_at_once(sound):
    odd = {FIRST + A: torch.full((4, 48), float("nan"))}
    faults = refused(without(holding(sound, FIRST + B, **odd), r="4", lora_alpha=0))
    assert [word in fault for word, fault in zip(("r='4'", "lora_alpha=0", "partner", "NaN"), faults, strict=True)] == [
        True
    ] * 4


def test_the_raw_reader_reports_in_place_of_refusing(sound, tmp_path):
    save_adapter(tmp_path / "a", without(holding(sound, FIRST + B), lora_alpha=0))
    found = read_folder(tmp_path / "a")[0]
    assert len(faults_of_form(found.tensors, found.peft_config)) == 2
    assert faults_of_numbers(found.tensors) == []
    with pytest.raises(UserError, match=r"lora_alpha=0[\s\S]*lacks its partner"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    "changed", [{"r": "4"}, {"r": 0}, {"target_parameters": 5}, {"target_parameters": "mlp.experts.down_proj"}]
)
def test_fused_experts_that_cannot_be_cut_apart(changed, tmp_path):
    """Their ranks are needed to read them at all."""
    one = adapter_of("qwen3_moe")
    save_adapter(tmp_path / "a", one)
    config = {**one.peft_config, **changed}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"adapter_config.json has {next(iter(changed))}="):
        load_adapter(tmp_path / "a")
