"""The published logs of Llama-3.2-1B-Instruct, recomputed from their own rows in compat mode."""

import json

import numpy as np
import pytest
from helpers_eval import SHARED, metrics_of, needs_shared

from fedunlearn.evals.files import read_log, summary
from fedunlearn.evals.generation import clean
from fedunlearn.metrics.base import Evidence, compute_metrics
from fedunlearn.metrics.forget_quality import forget_quality
from fedunlearn.metrics.membership import LossAttack, PrivLeak, ZlibAttack, auc
from fedunlearn.records.evaluation import AnswerScore, EvalLog, Generations, ScoreTable

pytestmark = needs_shared
NAME = "golden/tofu_Llama-3.2-1B-Instruct_{}/TOFU_EVAL.json"
FULL = "full/evals_forget{}"
BY_TOKENS = ("extraction_strength", "exact_memorization")
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
    retain = None if retain_ratio is None else EvalLog({"forget_truth_ratio": retain_ratio}, {})
    derived = {name: metric for name, metric in metrics_of().items() if name not in BY_TOKENS}
    return compute_metrics(derived, Evidence(tables=tables, texts=texts, retain=retain, compat=compat))


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


ATTACK_NAMES = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm", "mia_reference")
FLOAT32_MEANS = ("mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm")
EVERY = [*(FULL.format(forget) for forget, _ in PAIRS), *(f"retain{retain}" for _, retain in PAIRS)]


@pytest.mark.parametrize("name", EVERY)
def test_areas_under_the_curve_and_means_of_every_attack(name):
    log = golden(name)
    found = [one for one in ATTACK_NAMES if one in log.metrics]
    assert len(found) >= 5
    for one in found:
        result = log.metrics[one]
        sides = [result.parts[side].column("score") for side in ("forget", "holdout")]
        assert auc(*sides) == pytest.approx(result.agg_value, rel=1e-9), one
        for side, scores in zip(("forget", "holdout"), sides, strict=True):
            mean = float(np.mean(np.array(scores, dtype=np.float32 if one in FLOAT32_MEANS else np.float64)))
            assert mean == pytest.approx(result.parts[side].agg_value, rel=1e-9), (one, side)


@pytest.mark.parametrize("name", EVERY)
def test_attacks_of_the_loss_are_made_of_the_stored_losses_and_the_answers_own_bytes(name):
    """mia_loss and mia_zlib of the forget side from forget_Q_A_Prob and the answers of TOFU, which are the label texts of Llama-3."""
    log = golden(name)
    scores = answer_scores(log, "forget_Q_A_Prob")
    split = {400: "forget10", 200: "forget05", 40: "forget01"}[len(scores)]
    answers = [
        json.loads(line)["answer"] for line in (SHARED / "tofu" / f"{split}_perturbed.json").read_text().splitlines()
    ]
    table = ScoreTable(plain=scores, label_texts=tuple(map(clean, answers)))
    for one, attack in (("mia_loss", LossAttack()), ("mia_zlib", ZlibAttack())):
        stored = log.metrics[one].parts["forget"].column("score")
        assert attack.scores(table) == pytest.approx(stored, rel=1e-9), one


@pytest.mark.parametrize("name", EVERY)
def test_memorisation_is_the_mean_of_its_rows(name):
    for one in BY_TOKENS:
        result = golden(name).metrics[one]
        scores = [row["score"] for row in result.value_by_index if row]
        assert float(np.mean(scores)) == pytest.approx(result.agg_value, rel=1e-9)


@pytest.mark.parametrize(("forget", "retain"), PAIRS)
def test_privacy_leakage_by_both_definitions(forget, retain):
    """Theirs takes 0.5 where there is no log, so that it cannot be made of the retain log's AUC; with one the two agree to the 1e-10."""
    log, oracle = golden(FULL.format(forget)), golden(f"retain{retain}")
    with_log = PrivLeak().compute(Evidence(tables={}, metrics=log.metrics, retain=oracle, compat="open-unlearning"))
    assert with_log.agg_value == pytest.approx(log.metrics["privleak"].agg_value, rel=1e-9)
    ours = PrivLeak().compute(Evidence(tables={}, metrics=log.metrics, retain=oracle))
    assert ours.agg_value == pytest.approx(with_log.agg_value, rel=1e-8)
    alone = PrivLeak().compute(Evidence(tables={}, metrics=oracle.metrics, compat="open-unlearning"))
    assert alone.agg_value == pytest.approx(oracle.metrics["privleak"].agg_value, rel=1e-9)
    assert PrivLeak().compute(Evidence(tables={}, metrics=oracle.metrics)).agg_value is None
