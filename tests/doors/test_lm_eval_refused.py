"""What `lm_eval` refuses without the harness: its settings, its absence, and runs that have no use for it."""

import sys

import pytest
from helpers_runs import CONFIGS, finetune

from fedunlearn.doors.compose import compose
from fedunlearn.doors.evaluation import run_evaluation
from fedunlearn.errors import UserError
from fedunlearn.evals import lm_eval


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("lm_eval.tasks=[]",), r"lm_eval.tasks=\[\] names none"),
        (("lm_eval.tasks=[a,a]",), "names one twice"),
        (("lm_eval.limit=0",), r"lm_eval.limit=0 must be at least 1, or null"),
        (("lm_eval.limit=0.5",), r"lm_eval.limit=0.5 does not fit"),
        (("lm_eval.num_fewshot=-1",), r"lm_eval.num_fewshot=-1 must be at least 0"),
        (("lm_eval.batch_size=0",), r"lm_eval.batch_size=0 must be at least 1"),
        (("lm_eval.task=[a]",), r"lm_eval.task=\['a'\] is an unknown key; did you mean 'tasks'"),
    ],
)
def test_settings_without_sense_are_refused(overrides, said):
    with pytest.raises(UserError, match=said):
        compose(CONFIGS, "eval.yaml", ["task_name=t", "lm_eval=default", *overrides])


def test_settings_without_tasks_are_refused():
    with pytest.raises(UserError, match=r"lm_eval.tasks is missing"):
        compose(CONFIGS, "eval.yaml", ["task_name=t", "lm_eval.limit=3"])


def test_tasks_alone_are_enough():
    assert compose(CONFIGS, "eval.yaml", ["task_name=t", "lm_eval.tasks=[piqa]"]).run.lm_eval.tasks == ("piqa",)


def test_without_it_nothing_is_asked():
    assert compose(CONFIGS, "eval.yaml", ["task_name=t"]).run.lm_eval is None


def test_training_has_no_such_group():
    with pytest.raises(UserError, match="uses no group 'lm_eval'"):
        compose(CONFIGS, "train-lora.yaml", ["task_name=t", "lm_eval=default"])


@pytest.mark.parametrize("missing", lm_eval.MODULES)
def test_without_the_package_its_extra_is_named_before_a_model_is_loaded(pocket, saves, monkeypatch, missing):
    tuned = finetune(pocket, saves, "ft")
    for name in lm_eval.MODULES[: lm_eval.MODULES.index(missing)]:
        monkeypatch.setitem(sys.modules, name, sys)  # there, whatever it is
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("fedunlearn.doors.evaluation.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"pip install 'fedunlearn\[lm-eval\]'"):
        run_evaluation(asked_of(tuned, pocket, saves))
    assert not (saves / "eval").exists()


def test_a_folder_without_tasks_is_refused(pocket, saves, tmp_path):
    tuned = finetune(pocket, saves, "ft")
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=r"lm_eval.include_path=.* is no folder with a .yaml in it"):
            run_evaluation(asked_of(tuned, pocket, saves, f"lm_eval.include_path={place / 'tasks'}"))


def asked_of(tuned, pocket, saves, *overrides):
    places = (
        f"tofu_path={pocket.data}", f"paths.saves_dir={saves}", f"paths.cache_dir={saves}/cache", f"paths.pocket_dir={saves}/pocket",
        "model.model_args.lora_config.r=4", "task_name=x", f"model.model_args.pretrained_model_name_or_path={tuned}",
    )  # fmt: skip
    return compose(CONFIGS, "eval.yaml", ["experiment=eval/tofu/pocket", "lm_eval=default", *places, *overrides])
