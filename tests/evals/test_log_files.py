"""TOFU_EVAL.json and TOFU_SUMMARY.json: what is written is what is read, and what is no log is refused."""

import json
import math

import pytest

from fedunlearn.errors import UserError
from fedunlearn.evals.files import read_log, summary, write_log
from fedunlearn.records.evaluation import EvalLog, MetricResult


def small_log(**provenance):
    attack = {side: MetricResult(0.5, "log-space", ({"score": 0.5},)) for side in ("forget", "holdout")}
    metrics = {
        "forget_Q_A_PERT_Prob": MetricResult(0.25, "log-space", ({"prob": (0.1, 0.4), "avg_loss": (2.5, 1.0)},)),
        "forget_Q_A_ROUGE": MetricResult(1.0, "log-space", ({"rougeL_recall": 1.0, "generation": "Zoë"},)),
        "forget_quality": MetricResult(None, "log-space"),
        "mia_min_k": MetricResult(0.75, "log-space", parts=attack),
        "model_utility": MetricResult(0.6, "log-space"),
    }
    return EvalLog(metrics, {"definition": "log-space", "forget_split": "forget10", **provenance})


def test_a_log_comes_back_as_it_was_written(tmp_path):
    write_log(small_log(), tmp_path / "run")
    assert read_log(tmp_path / "run" / "TOFU_EVAL.json") == small_log()
    assert read_log(tmp_path / "run") == small_log()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["TOFU_EVAL.json", "TOFU_SUMMARY.json"]


def test_keys_and_shapes_are_those_of_open_unlearning(tmp_path):
    write_log(small_log(), tmp_path)
    body = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    assert body["forget_Q_A_PERT_Prob"] == {
        "agg_value": 0.25,
        "value_by_index": {"0": {"prob": [0.1, 0.4], "avg_loss": [2.5, 1.0]}},
    }
    assert body["mia_min_k"]["forget"] == {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.5}}}
    assert (body["mia_min_k"]["auc"], body["mia_min_k"]["agg_value"]) == (0.75, 0.75)
    assert body["forget_quality"] == {"agg_value": None}
    assert "Zoë" in (tmp_path / "TOFU_EVAL.json").read_text(encoding="utf-8")


def test_summary_holds_named_metrics_that_have_a_value(tmp_path):
    write_log(small_log(), tmp_path)
    assert json.loads((tmp_path / "TOFU_SUMMARY.json").read_text()) == {
        "forget_Q_A_ROUGE": 1.0,
        "mia_min_k": 0.75,
        "model_utility": 0.6,
    }
    assert all(isinstance(value, float) for value in summary(small_log()).values())


def test_nan_reaches_no_file_and_the_old_file_stays(tmp_path):
    write_log(small_log(), tmp_path)
    before = (tmp_path / "TOFU_EVAL.json").read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_log(small_log(loss=math.nan), tmp_path)
    assert (tmp_path / "TOFU_EVAL.json").read_text() == before


def test_a_log_without_provenance_follows_their_definitions(tmp_path):
    file = tmp_path / "TOFU_EVAL.json"
    file.write_text('{"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.5}}}}')
    log = read_log(file)
    assert log.provenance == {}
    assert log.metrics["forget_truth_ratio"].definition == "open-unlearning"
    assert log.metrics["forget_truth_ratio"].column("score") == (0.5,)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no json", "Expecting value"),
        ("{}", "holds no metric"),
        ("[]", "list"),
        ('{"forget_quality": 0.5}', "forget_quality has no agg_value"),
        ('{"a": {"agg_value": NaN}}', "it holds NaN"),
        ('{"a": {"agg_value": 1, "value_by_index": {"1": {"score": 1}}}}', "rows of a are not numbered 0 .. 0"),
        ('{"a": {"agg_value": 1, "value_by_index": {"0": 1}}}', "row that is no JSON object"),
        ('{"provenance": 3}', "provenance is no JSON object"),
        ('{"provenance": {"definition": "mine"}}', "definition 'mine' is unknown; known: log-space, open-unlearning"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, text, fault):
    file = tmp_path / "log.json"
    file.write_text(text)
    with pytest.raises(
        UserError, match=rf"retain_logs_path='.*log.json' is no TOFU_EVAL.json \(.*{fault}.*evaluate the oracle again"
    ):
        read_log(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"retain_logs_path='.*nowhere.json': there is no such file; give the TOFU_EVAL.json"
    ):
        read_log(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="there is no such file"):
        read_log(tmp_path)


@pytest.mark.parametrize("text", ['"0.5"', "true", "[0.5]"])
def test_what_stands_where_a_number_is_wanted_is_refused(tmp_path, text):
    (tmp_path / "log.json").write_text(f'{{"forget_quality": {{"agg_value": {text}}}}}')
    with pytest.raises(UserError, match="stands where a number is wanted"):
        read_log(tmp_path / "log.json")


def test_a_log_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "log.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"is no TOFU_EVAL\.json"):
        read_log(tmp_path / "log.json")
