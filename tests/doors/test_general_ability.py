"""lm-evaluation-harness through the door: its numbers are a plain loop's, the model is left as it was, and nothing that is set goes unheard."""

import json
import math
import os
import random
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_lm_eval import QUESTIONS, SENTENCES, plain_choices, plain_logp, write_tasks
from helpers_runs import CONFIGS, finetune
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedunlearn.config.lm_eval import LmEvalConfig
from fedunlearn.doors.compose import compose
from fedunlearn.doors.evaluation import run_evaluation, run_evaluations
from fedunlearn.doors.prepare import find_inputs, load_model
from fedunlearn.doors.shown import run_shown
from fedunlearn.errors import UserError
from fedunlearn.evals import lm_eval
from fedunlearn.evals.lm_eval import evaluate_tasks, load_tasks
from fedunlearn.evals.lm_eval_file import read_lm_eval
from fedunlearn.models import resident

pytest.importorskip("lm_eval")
DOCS = CONFIGS.parent / "docs" / "general-ability.md"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """One folder for all tests: the harness indexes it, and its own 14,000 names, once."""
    return write_tasks(tmp_path_factory.mktemp("lm_eval") / "tasks")


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def evaluation(pocket, saves, tasks):
    """Composes an evaluation of a run, with the harness's tasks."""

    def composed(task, start, *overrides, harness=True):
        places = (
            f"tofu_path={pocket.data}", f"paths.saves_dir={saves}", f"paths.cache_dir={saves}/cache", f"paths.pocket_dir={saves}/pocket",
            "eval.max_new_tokens=2", "model.model_args.lora_config.r=4", f"task_name={task}",
        )  # fmt: skip
        named = () if start is None else (f"model.model_args.pretrained_model_name_or_path={start}",)
        asked = ("lm_eval=default", f"lm_eval.include_path={tasks}", "lm_eval.tasks=[pocket_choices]")
        asked = asked if harness else ()
        return compose(CONFIGS, "eval.yaml", ["experiment=eval/tofu/pocket", *places, *named, *asked, *overrides])

    return composed


@pytest.fixture
def samples(monkeypatch):
    """The rows of each call of the harness, with its log-probabilities."""
    import lm_eval.evaluator

    seen, real = [], lm_eval.evaluator.evaluate

    def noting(**arguments):
        found = real(**arguments)
        seen.append(found["samples"])
        return found

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", noting)
    return seen


def theirs(pocket, run):
    """The run's adapter as PEFT loads it, and the tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(pocket.model)
    return PeftModel.from_pretrained(base, run / "adapter").eval(), AutoTokenizer.from_pretrained(pocket.model)


def logps(rows):
    """Log-probabilities by row and choice, in the order of the rows."""
    return [[float(answer[0]) for answer in row["filtered_resps"]] for row in sorted(rows, key=lambda r: r["doc_id"])]


@pytest.mark.parametrize("aggregation", ["fedit", "fedex"])
def test_choices_are_scored_as_a_plain_loop_over_pefts_own_model_scores_them(
    pocket, saves, evaluation, samples, aggregation
):
    """fedex leaves a stacked adapter, which is a side-car here and plain factors to PEFT."""
    tuned = finetune(pocket, saves, "ft", f"aggregation={aggregation}")
    run_evaluation(evaluation("ev", tuned, "lm_eval.batch_size=3"))
    model, tokenizer = theirs(pocket, tuned)
    wanted = plain_choices(model, tokenizer)
    for found, plain in zip(logps(samples[0]["pocket_choices"]), wanted, strict=True):
        assert found == pytest.approx(plain, abs=1e-4)
    with model.disable_adapter():
        assert plain_choices(model, tokenizer)[0] != pytest.approx(wanted[0], abs=1e-4)
    right = [max(range(len(row)), key=row.__getitem__) == one[2] for row, one in zip(wanted, QUESTIONS, strict=True)]
    body = json.loads((saves / "eval" / "ev" / "LM_EVAL.json").read_text())
    share = sum(right) / len(right)
    assert body["tasks"]["pocket_choices"]["metrics"]["acc"] == {
        "value": share,
        "stderr": pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1))),
    }


def test_perplexity_groups_and_texts(pocket, saves, evaluation):
    """Perplexity is exp of minus the mean log-probability of a whole continuation; a group's accuracy is pooled over its tasks."""
    tuned = finetune(pocket, saves, "ft")
    run_evaluation(evaluation("ev", tuned, "lm_eval.tasks=[pocket_general,pocket_sentences,pocket_answers]"))
    found = read_lm_eval(saves / "eval" / "ev")
    model, tokenizer = theirs(pocket, tuned)
    plain = [plain_logp(model, tokenizer, start, f" {end}") for start, end in SENTENCES]
    assert math.log(found.tasks["pocket_sentences"].metrics["perplexity"].value) == pytest.approx(
        -sum(plain) / len(plain), abs=1e-4
    )
    group, part = found.tasks["pocket_general"], found.tasks["pocket_choices"]
    assert (group.num_rows, part.num_rows, part.part_of, group.part_of) == (10, 5, "pocket_general", None)
    assert group.metrics["acc"].value == pytest.approx(part.metrics["acc"].value)
    assert (part.version, part.num_fewshot) == (1.5, 0)
    assert found.tasks["pocket_answers"].num_rows == 3
    assert {task for task, _ in found.main_figures} == {"pocket_general", "pocket_sentences", "pocket_answers"}


def test_the_file_says_what_it_was_made_with_and_nothing_else_changes(pocket, saves, evaluation, tasks):
    tuned = finetune(pocket, saves, "ft")
    with_it = run_evaluation(evaluation("with", tuned, "lm_eval.limit=1"))
    without = run_evaluation(evaluation("without", tuned, harness=False))
    assert with_it.metrics == without.metrics
    assert read_lm_eval(saves / "eval" / "without") is None
    found = read_lm_eval(saves / "eval" / "with")
    said = found.provenance
    for key in ("base_fingerprint", "adapter_hash", "dtype", "config_hash"):
        assert said[key] == with_it.provenance[key]
    assert said["versions"]["lm_eval"]
    assert (said["limit"], said["trial"], said["batch_size"]) == (1, True, 8)
    one = found.tasks["pocket_choices"]
    assert (one.num_rows, one.metrics["acc"].stderr) == (1, None)


def test_several_adapters_share_one_base_and_keep_to_their_own(pocket, saves, evaluation, samples, monkeypatch, capsys):
    runs = [finetune(pocket, saves, f"ft{seed}", f"trainer.args.seed={seed}") for seed in range(2)]
    resident.release()
    loads, real = [], resident.load_base
    monkeypatch.setattr(resident, "load_base", lambda *a: loads.append(1) or real(*a))
    run_shown("evaluation", evaluation("all", None, f"adapters=[{','.join(map(str, runs))}]"))
    assert len(loads) == 1
    for found, run in zip(samples, runs, strict=True):
        for row, plain in zip(logps(found["pocket_choices"]), plain_choices(*theirs(pocket, run)), strict=True):
            assert row == pytest.approx(plain, abs=1e-4)
    hashes = [read_lm_eval(saves / "eval" / f"all.{number}").provenance["adapter_hash"] for number in (1, 2)]
    assert len(set(hashes)) == 2
    shown = capsys.readouterr().out
    assert "pocket_choices" in shown
    assert "acc_norm" in shown
    assert "±" in shown


def state_of(model, tokenizer):
    """Everything of a model and its tokenizer that could be moved, cast, switched or added to."""
    return (
        {name: (t.data_ptr(), t.dtype, t.device, t.requires_grad, t.detach().numpy().tobytes()) for name, t in model.named_parameters()},
        {name: buffer.numpy().tobytes() for name, buffer in model.named_buffers()},
        {name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()},
        model.config.to_dict(), model.generation_config.to_dict(),
        (tokenizer.padding_side, tokenizer.pad_token, len(tokenizer), tokenizer.backend_tokenizer.to_str()),
    )  # fmt: skip


def draws_of():
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tobytes(), *rest), torch.get_rng_state().numpy().tobytes()


def test_model_tokenizer_and_random_state_are_left_as_they_were(pocket, saves, evaluation):
    tuned = finetune(pocket, saves, "ft", "aggregation=fedex")
    composed = evaluation("x", tuned, "lm_eval.tasks=[pocket_choices,pocket_sentences,pocket_answers]")
    made = load_model(composed.run, find_inputs(composed.run, composed.plain).source)
    made.chat.tokenizer.pad_token = None  # what the harness would put right
    next(module for name, module in made.model.named_modules() if name.endswith("mlp")).training = True
    before = state_of(made.model, made.chat.tokenizer), draws_of(), dict(os.environ)
    loaded = load_tasks(composed.run.lm_eval)
    assert draws_of() == before[1]
    first = evaluate_tasks(made.model, made.chat, loaded, composed.run.lm_eval, {})
    assert state_of(made.model, made.chat.tokenizer) == before[0]
    assert draws_of() == before[1]
    assert {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTEST"))} == {
        k: v for k, v in before[2].items() if not k.startswith(("HF_", "PYTEST"))
    }
    random.seed(5)
    torch.manual_seed(5)
    again = evaluate_tasks(made.model, made.chat, load_tasks(composed.run.lm_eval), composed.run.lm_eval, {})
    assert again == first


def test_examples_come_before_the_question_and_are_the_same_each_time(pocket, saves, evaluation, samples):
    tuned = finetune(pocket, saves, "ft")
    for task, number in (("none", "null"), ("two", "2"), ("again", "2")):
        run_evaluation(evaluation(task, tuned, f"lm_eval.num_fewshot={number}"))
    none, two, again = (
        read_lm_eval(saves / "eval" / task).tasks["pocket_choices"] for task in ("none", "two", "again")
    )
    assert (none.num_fewshot, two.num_fewshot) == (0, 2)
    assert two == again
    assert two.rows_hash != none.rows_hash
    texts = [found["pocket_choices"][0]["arguments"][0][0].count("Question:") for found in samples]
    assert texts == [1, 3, 3]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("lm_eval.tasks=[pocket_choises]",), r"lm_eval.tasks: 'pocket_choises' is unknown; did you mean 'pocket_choices'"),
        (("lm_eval.tasks=[hellaswagg,nothing_like_it_at_all]",), r"did you mean 'hellaswag'(.|\n)*'nothing_like_it_at_all' is unknown"),
        (("lm_eval.tasks=[pocket_sentences]", "lm_eval.num_fewshot=2"), r"lm_eval.num_fewshot=2, but 'pocket_sentences' is defined without examples"),
        (("lm_eval.num_fewshot=5",), r"'pocket_choices' cannot be asked with 5 examples before the question \(ValueError.*set lm_eval.num_fewshot lower"),
        (("lm_eval.include_path=null",), r"'pocket_choices' is unknown"),
    ],
)  # fmt: skip
def test_what_the_harness_would_pass_over_is_refused_before_a_model_is_loaded(
    pocket, saves, evaluation, monkeypatch, overrides, said
):
    tuned = finetune(pocket, saves, "ft")
    monkeypatch.setattr("fedunlearn.doors.evaluation.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=said):
        run_evaluation(evaluation("x", tuned, *overrides))
    assert not (saves / "eval").exists()


def test_a_folder_of_tasks_that_nobody_asks_for_is_told(pocket, tmp_path, tasks, monkeypatch, caplog):
    """Asked by hand: the task's own data would come from the network."""
    manager = lm_eval._manager(str(tasks))
    monkeypatch.setattr(lm_eval, "_manager", lambda _: manager)
    asked = LmEvalConfig(tasks=("pocket_choices",), include_path=str(tasks))
    load_tasks(asked)
    assert "none of lm_eval.tasks" not in caplog.text
    (tmp_path / "other.yaml").write_text("task: other")
    load_tasks(replace(asked, include_path=str(tmp_path)))
    assert f"lm_eval.include_path={tmp_path}: none of lm_eval.tasks comes from there" in caplog.text


def test_rows_that_are_not_there_are_told_by_the_tasks_name(pocket, saves, evaluation, tasks):
    tuned = finetune(pocket, saves, "ft")
    rows = tasks / "questions.jsonl"
    kept = rows.read_bytes()
    rows.unlink()
    try:
        with pytest.raises(UserError, match=r"lm_eval.tasks: 'pocket_choices' cannot be read \(FileNotFoundError"):
            run_evaluations(evaluation("x", tuned))
    finally:
        rows.write_bytes(kept)


def test_the_command_of_the_docs_runs_on_the_task_of_the_docs(pocket, saves, tmp_path, monkeypatch):
    command, task = re.findall(r"^```(?:yaml)?\n(.*?)^```$", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    finetune(pocket, saves, "ft")
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "colours.yaml").write_text(task)
    (tmp_path / "my_tasks" / "colours.jsonl").write_text(re.search(r"# (\{.*\}), one a line", task)[1] + "\n")
    monkeypatch.chdir(tmp_path)
    python, door, *words = shlex.split(command)
    assert (python, door) == ("python", "src/eval.py")
    places = (f"tofu_path={pocket.data}", "model.model_args.lora_config.r=4", "eval.max_new_tokens=2")
    run_evaluation(compose(CONFIGS, "eval.yaml", [*words, *places]))
    assert read_lm_eval(saves / "eval" / "x").tasks["colours"].num_rows == 1
