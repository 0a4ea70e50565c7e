"""The published logs of Llama-3.2-1B-Instruct, recomputed from their own rows in compat mode."""

import json

import pytest
from helpers_eval import SHARED, needs_shared

from fedunlearn.evals.files import read_log, summary
from fedunlearn.metrics.forget_quality import forget_quality
from fedunlearn.metrics.tofu import tofu_metrics
from fedunlearn.records.evaluation import AnswerScore, Generations, ScoreTable

pytestmark = needs_shared
NAME = "golden/tofu_Llama-3.2-1B-Instruct_{}/TOFU_EVAL.json"
FULL = "full/evals_forget{}"
PAIRS = [("01", "99"), ("05", "95"), ("10", "90")]


def golden(name):
    return read_log(SHARED / NAME.format(name))


def answer_scores(log, metric):
    rows = log.metrics[metric].value_by_index if metric in log.metrics else ()
    return tuple(AnswerScore(row["avg_loss"], row["prob"], 1) for row in rows)


def table_of(log, name):
    wrong = log.metrics[f"{name}_Q_A_PERT_Prob"].value_by_index
    perturbed = tuple(
        tuple(AnswerScore(*pair, 1) for pair in zip(row["avg_loss"], row["prob"], strict=True)) for row in wrong
    )
    return ScoreTable(answer_scores(log, f"{name}_Q_A_Prob"), perturbed, answer_scores(log, f"{name}_Q_A_PARA_Prob"))


def texts_of(log, name):
    rows = log.metrics[f"{name}_Q_A_ROUGE"].value_by_index
    return Generations(*(tuple(str(row[key]) for row in rows) for key in ("input", "ground_truth", "generation")))


def recompute(log, retain_ratio, compat="open-unlearning"):
    names = ("forget", "retain", "ra", "wf")
    tables, texts = {name: table_of(log, name) for name in names}, {name: texts_of(log, name) for name in names}
    return tofu_metrics(tables, texts, retain_ratio, compat=compat)


def worst_row(ours, theirs):
    """Largest difference of any number of any row; texts and keys must be equal."""
    assert len(ours) == len(theirs)
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine) == set(other)
        for key, value in other.items():
            numbers = zip(mine[key], value, strict=True) if isinstance(value, tuple) else [(mine[key], value)]
            worst = max([worst, *(0.0 if a == b else abs(a - b) for a, b in numbers)])
    return worst


@pytest.mark.parametrize(("forget", "retain"), PAIRS)
def test_full_model_recomputes_row_by_row(forget, retain):
    log, oracle = golden(FULL.format(forget)), golden(f"retain{retain}")
    found = recompute(log, oracle.metrics["forget_truth_ratio"])
    assert len(found) == 22
    for name, result in found.items():
        assert result.agg_value == pytest.approx(log.metrics[name].agg_value, rel=1e-9, abs=0), name
        assert worst_row(result.value_by_index, log.metrics[name].value_by_index) < 1e-9, name


@pytest.mark.parametrize("retain", ["99", "95", "90"])
def test_oracles_recompute(retain):
    log = golden(f"retain{retain}")
    for name, result in recompute(log, None).items():
        if name != "forget_quality":
            assert result.agg_value == pytest.approx(log.metrics[name].agg_value, rel=1e-9, abs=0), name
            assert worst_row(result.value_by_index, log.metrics[name].value_by_index) < 1e-9, name


@pytest.mark.parametrize(("forget", "value"), [("01", 6.761e-3), ("05", 1.428e-12), ("10", 3.905e-22)])
def test_forget_quality_is_the_published_one(forget, value):
    retain = dict(PAIRS)[forget]
    ratio, other = (golden(name).metrics["forget_truth_ratio"] for name in (FULL.format(forget), f"retain{retain}"))
    assert forget_quality(ratio, other).agg_value == pytest.approx(value, rel=2e-4)


def test_log_space_differs_from_theirs_by_1e_minus_6_at_most():
    worst: dict[str, float] = {}
    for log in map(golden, (FULL.format("10"), "retain90", "retain95", "retain99")):
        ours = recompute(log, None, compat=None)
        for name in set(ours) - {"forget_quality"}:
            worst[name] = max(worst.get(name, 0.0), abs(ours[name].agg_value - log.metrics[name].agg_value))
    assert max(worst, key=worst.get) == "wf_Truth_Ratio"
    assert worst["wf_Truth_Ratio"] == pytest.approx(1.4e-6, abs=0.1e-6)
    assert worst["model_utility"] < 5.5e-8


@pytest.mark.parametrize("name", ["full/evals_forget10", "retain90", "retain95", "retain99"])
def test_summary_has_the_published_keys_and_values(name):
    folder = (SHARED / NAME.format(name)).parent
    assert summary(golden(name)) == json.loads((folder / "TOFU_SUMMARY.json").read_text())
