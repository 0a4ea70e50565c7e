"""LoRA's settings under other systems' names: understood with one line that tells today's, or refused."""

import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedunlearn.doors.compose import compose
from fedunlearn.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
ARGS = "model.model_args."
LORA = ARGS + "lora_config."
PLACES = ["", ARGS, LORA]


def composed(*overrides, primary="train-lora.yaml"):
    return compose(CONFIGS, primary, ["task_name=t", *overrides])


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "fedunlearn.doors.compose"]


def overlay(tmp_path, text):
    """A recipe of the user's own."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    return [f"hydra.searchpath=['file://{tmp_path}']", "experiment=mine"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["rank", "lora_rank"])
def test_a_rank(place, name, caplog):
    made = composed(f"{place}{name}=4")
    assert made.run.model.model_args.lora_config.r == 4
    assert told(caplog) == [f"{place}{name}=4 is understood as {LORA}r=4, its name here"]
    assert name not in OmegaConf.create(made.text)
    assert made.plain["model"]["model_args"]["lora_config"]["r"] == 4


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["lora_target", "lora_target_modules"])
@pytest.mark.parametrize("form", ["q_proj,v_proj", "'q_proj, v_proj'", "[q_proj,v_proj]"])
def test_targets_as_a_text_with_commas(place, name, form, caplog):
    """A bare comma would be a sweep to Hydra."""
    made = composed(f"{place}{name}={form}")
    assert made.run.model.model_args.lora_config.target_modules == ("q_proj", "v_proj")
    assert len(told(caplog)) == 1
    assert f"{LORA}target_modules=['q_proj', 'v_proj']" in told(caplog)[0]


@pytest.mark.parametrize(
    ("word", "means"),
    [("c_attn", ("c_attn",)), ("all", "all-linear"), ("all-linear", "all-linear"), ("attention", "attention")],
)
def test_one_word_is_a_name_unless_it_stands_for_many(word, means):
    """Today a text alone is a regular expression; in those systems it is a list of one."""
    assert composed(f"lora_target={word}").run.model.model_args.lora_config.target_modules == means


@pytest.mark.parametrize(("value", "means"), [("some/adapter", "some/adapter"), ("''", None), ("null", None)])
def test_a_path_to_load(value, means, caplog):
    assert composed(f"lora_load_path={value}").run.model.model_args.lora_model_path == means
    assert f"{ARGS}lora_model_path=" in told(caplog)[0]


def test_a_path_to_save_to_is_taken_where_it_is_what_happens(caplog):
    made = composed("lora_save_path=elsewhere/finetune/t/adapter", "paths.saves_dir=elsewhere")
    assert "lora_save_path" not in made.plain
    assert told(caplog) == [
        "lora_save_path='elsewhere/finetune/t/adapter' is where the run writes its adapter: paths.saves_dir and task_name say so here"
    ]


@pytest.mark.parametrize(
    ("primary", "path", "reason"),
    [
        ("train-lora.yaml", "out", r"a run writes its adapter to paths.saves_dir/finetune/<task_name>/adapter, here"),
        ("unlearn-lora.yaml", "saves/finetune/t/adapter", r"paths.saves_dir/unlearn/<task_name>/adapter, here"),
        ("eval.yaml", "saves/eval/t/adapter", "a run of mode eval makes no adapter; leave it out"),
    ],
)
def test_any_other_path_to_save_to_is_refused(primary, path, reason):
    with pytest.raises(UserError, match=reason):
        composed(f"lora_save_path={path}", primary=primary)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["lora_rank=4", f"{LORA}r=4"], rf"lora_rank=4 beside {LORA}r=4, which is the same setting"),
        (["lora_rank=4", "rank=8"], "rank=8 beside lora_rank=4"),
        (["lora_rank=4", f"{LORA}rank=4"], rf"{LORA}rank=4 beside lora_rank=4"),
        (["lora_target=q_proj", f"{LORA}target_modules=all-linear"], "lora_target='q_proj' beside"),
        (["lora_load_path=a", f"{ARGS}lora_model_path=b"], "lora_load_path='a' beside"),
    ],
)
def test_two_names_for_one_setting_are_refused(overrides, match):
    with pytest.raises(UserError, match=match):
        composed(*overrides)


def test_a_preset_is_beneath_an_older_name_too():
    found = composed("lora=high", "lora_rank=4").run.model.model_args.lora_config
    assert (found.r, found.lora_alpha) == (4, 128.0)


class TestInYaml:
    def test_a_recipe_s_older_name_beats_the_model_s_file(self, tmp_path, caplog):
        made = composed(*overlay(tmp_path, "lora_rank: 4\nmodel: {model_args: {lora_target: 'q_proj,k_proj'}}"))
        found = made.run.model.model_args.lora_config
        assert (found.r, found.target_modules) == (4, ("q_proj", "k_proj"))
        assert len(told(caplog)) == 2

    def test_beside_today_s_name_in_a_yaml_it_is_refused(self, tmp_path):
        with pytest.raises(UserError, match=rf"lora_rank=4 beside {LORA}r=5"):
            composed(*overlay(tmp_path, "lora_rank: 4\nmodel: {model_args: {lora_config: {r: 5}}}"))

    def test_beside_today_s_name_on_the_command_line_it_is_refused(self, tmp_path):
        with pytest.raises(UserError, match=rf"lora_rank=4 beside {LORA}r=16"):
            composed(*overlay(tmp_path, "lora_rank: 4"), f"{LORA}r=16")

    def test_in_a_model_s_own_file_it_stands_for_what_is_missing(self, tmp_path):
        (tmp_path / "model").mkdir()
        text = (CONFIGS / "model" / "pocket-llama-lora.yaml").read_text().replace("    r: 16", "    lora_rank: 4")
        (tmp_path / "model" / "mine.yaml").write_text(text)
        place = f"hydra.searchpath=['file://{tmp_path}']"
        assert composed(place, "model=mine").run.model.model_args.lora_config.r == 4
        (tmp_path / "model" / "mine.yaml").write_text(text.replace("    lora_rank: 4", "    lora_rank: 4\n    r: 16"))
        with pytest.raises(UserError, match=rf"{LORA}lora_rank=4 beside {LORA}r=16"):
            composed(place, "model=mine")


def test_faults_of_all_sorts_come_together():
    with pytest.raises(UserError, match="no rank") as caught:
        composed("lora_rank=0", "lora_save_path=out", "nonsense=1")
    assert len(caught.value.faults) == 3


def test_beside_a_fault_of_the_command_line_it_is_still_understood():
    with pytest.raises(UserError, match="method='nope'") as caught:
        composed("lora_rank=4", "method=nope", primary="unlearn-lora.yaml")
    assert not any("lora_rank" in fault for fault in caught.value.faults)


def test_a_sweep_over_another_key_is_one_still(caplog):
    with pytest.raises(UserError, match="is a sweep"):
        composed("lora_rank=4,8")
    with caplog.at_level(logging.WARNING):
        composed()
    assert not told(caplog)
