"""`lora=` fills the model's lora_config: it beats the model's YAML, and experiment and command line beat it."""

from dataclasses import asdict
from pathlib import Path

import pytest

from fedunlearn.config.lora import PRESET_DROPOUT, PRESET_TARGETS, SEVEN
from fedunlearn.doors.compose import compose
from fedunlearn.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
BUILT = {
    "fast": {"r": 8, "lora_alpha": 16.0, "target_modules": ("q_proj", "v_proj"), "lora_dropout": 0.1},
    "balanced": {"r": 16, "lora_alpha": 32.0, "target_modules": SEVEN, "lora_dropout": 0.1},
    "high": {"r": 64, "lora_alpha": 128.0, "target_modules": SEVEN, "lora_dropout": 0.05},
}
R = "model.model_args.lora_config.r"
DOORS = {
    "train-lora.yaml": [],
    "unlearn-lora.yaml": [],
    "eval.yaml": [],
    "probe.yaml": ["probe.unlearned={a: b}", "probe.oracle=other"],
}


def lora(*overrides, primary="train-lora.yaml"):
    run = compose(CONFIGS, primary, ["task_name=t", *DOORS[primary], *overrides]).run
    return run.model.model_args.lora_config


@pytest.mark.parametrize("primary", DOORS)
@pytest.mark.parametrize("preset", BUILT)
def test_each_preset_arrives_in_every_door(primary, preset):
    found = asdict(lora(f"lora={preset}", primary=primary))
    assert {key: found[key] for key in BUILT[preset]} == BUILT[preset]
    assert found["preset"] == preset
    assert (found["bias"], found["task_type"]) == ("none", "CAUSAL_LM")


def test_without_one_the_model_s_own_file_stands():
    assert (lora().r, lora().lora_dropout, lora().preset) == (16, 0.05, None)


def test_the_command_line_beats_the_preset_wherever_it_stands():
    for overrides in (["lora=fast", f"{R}=4"], [f"{R}=4", "lora=fast"]):
        found = lora(*overrides)
        assert (found.r, found.lora_alpha, found.target_modules) == (4, 16.0, ("q_proj", "v_proj"))


def test_the_preset_beats_the_model_that_an_experiment_chooses():
    found = lora("experiment=finetune/tofu/pocket", "lora=fast")
    assert (found.r, found.preset) == (8, "fast")


def test_an_experiment_s_own_value_beats_the_preset(tmp_path):
    """A recipe may choose a preset and change one value of it."""
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /lora: high\nmodel:\n  model_args:\n    lora_config: {r: 5}\n"
    )
    found = lora(f"hydra.searchpath=['file://{tmp_path}']", "experiment=mine")
    assert (found.r, found.lora_alpha, found.preset) == (5, 128.0, "high")


def test_the_files_and_the_record_say_the_same():
    """The record needs them where a base cannot take what the preset says."""
    for preset, values in BUILT.items():
        assert PRESET_DROPOUT[preset] == values["lora_dropout"]
        assert PRESET_TARGETS[preset] == values["target_modules"]


def test_a_preset_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"lora='fats' is unknown; did you mean 'fast'\? Known: balanced, fast, high"):
        lora("lora=fats")


def test_a_preset_without_an_adapter_is_refused():
    with pytest.raises(UserError, match=r"lora=fast with model.model_args.use_lora=false"):
        lora("lora=fast", "model.model_args.use_lora=false")


def test_what_the_command_line_says_is_not_the_preset_s_to_change():
    assert lora("lora=fast").adapts == ("target_modules", "lora_dropout")
    assert lora("lora=fast", "model.model_args.lora_config.lora_dropout=0.1").adapts == ("target_modules",)
    assert lora("lora=fast", "lora_target=q_proj,v_proj").adapts == ("lora_dropout",)


@pytest.mark.parametrize("said", ["preset=high", "adapts=[lora_dropout]"])
@pytest.mark.parametrize("beside", [(), ("lora=fast",)])
def test_only_a_preset_names_itself(said, beside):
    key = said.split("=")[0]
    with pytest.raises(UserError, match=rf"lora_config\.{key} is set by a preset alone: choose one with lora=fast"):
        lora(*beside, f"model.model_args.lora_config.{said}")
