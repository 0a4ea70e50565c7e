"""TOFU's metrics by hand: two or three rows, the arithmetic in the docstring."""

import math

import pytest
from helpers_eval import metrics_of

from fedunlearn.metrics.base import Evidence, compute_metrics
from fedunlearn.metrics.forget_quality import forget_quality
from fedunlearn.metrics.model_utility import MODEL_UTILITY_PARTS, model_utility
from fedunlearn.metrics.probability import answer_probability, normalised_probability, perturbed_probability
from fedunlearn.metrics.rouge import rouge
from fedunlearn.metrics.truth_ratio import Kind, TruthRatio, truth_ratio
from fedunlearn.records.evaluation import AnswerScore, Compat, Generations, MetricResult, ScoreTable, definition_of

LN2 = math.log(2.0)


def score(avg_loss):
    return AnswerScore(avg_loss, math.exp(-avg_loss), 4)


def scores(*losses):
    return tuple(map(score, losses))


def ratios(*values, definition="log-space"):
    return MetricResult(0.5, definition, tuple({"score": float(value)} for value in values))


def test_probability_is_the_mean_of_exp_minus_loss():
    """Losses 0, ln 2, ln 4: (1 + 1/2 + 1/4) / 3 = 7/12."""
    result = answer_probability(scores(0.0, LN2, 2 * LN2))
    assert result.agg_value == pytest.approx(7 / 12, abs=1e-12)
    assert result.value_by_index[1] == {"prob": pytest.approx(0.5), "avg_loss": LN2}
    assert result.definition == "log-space"


def test_perturbed_probability_is_a_mean_of_means():
    """(1 + 1/2) / 2 = 3/4 and (1/4) / 1: their mean is 1/2, not the mean of the three, 7/12."""
    result = perturbed_probability((scores(0.0, LN2), scores(2 * LN2)))
    assert result.agg_value == pytest.approx(0.5, abs=1e-12)
    assert result.value_by_index[0]["avg_loss"] == (0.0, LN2)


def test_normalised_probability_by_hand():
    """1/2 against 1/4 and 1/4 is 1/2; 1/4 against 1/2 and 1/4 is 1/4; mean 3/8. The 1e-10 of compat takes 5e-11 at most."""
    right, wrong = scores(LN2, 2 * LN2), (scores(2 * LN2, 2 * LN2), scores(LN2, 2 * LN2))
    ours, theirs = normalised_probability(right, wrong), normalised_probability(right, wrong, compat="open-unlearning")
    assert ours.agg_value == pytest.approx(3 / 8, abs=1e-12)
    assert theirs.agg_value == pytest.approx(3 / 8 - (0.5 + 0.25) / 2 * 1e-10, abs=1e-13)
    assert theirs.definition == "open-unlearning"


def test_normalised_probability_of_a_collapsed_model_is_chance():
    """Four answers at 200 nats each: 1/4 in log space; in linear space exp(-200) drowns in 1e-10 and gives 0."""
    right, wrong = scores(200.0), (scores(200.0, 200.0, 200.0),)
    assert normalised_probability(right, wrong).agg_value == pytest.approx(0.25, abs=1e-12)
    assert normalised_probability(right, wrong, compat="open-unlearning").agg_value < 1e-70


def table(correct, *wrong, plain=None):
    rows = len(correct)
    return ScoreTable(plain or scores(*[9.0] * rows), tuple(scores(*losses) for losses in wrong), scores(*correct))


def ratio(scored: ScoreTable, kind: Kind, compat: Compat = None):
    """Of the paraphrased answers where there are some, as TOFU's files have them."""
    return truth_ratio(scored.paraphrased or scored.plain, scored.perturbed, kind, compat=compat)


def test_truth_ratio_of_forget_rows_by_hand():
    """Row 0: L_c = ln 2, L_w = mean(ln 2, 3 ln 2) = 2 ln 2, r = 1/2. Row 1: L_c = 2 ln 2, L_w = ln 2, r = 2, counted as 1/2."""
    result = ratio(table((LN2, 2 * LN2), (LN2, 3 * LN2), (LN2, LN2)), "forget")
    assert result.column("score") == pytest.approx((0.5, 2.0), abs=1e-12)
    assert result.agg_value == pytest.approx(0.5, abs=1e-12)


def test_truth_ratio_of_retain_rows_by_hand():
    """The same rows: max(0, 1 - 1/2) = 1/2 and max(0, 1 - 2) = 0, mean 1/4."""
    assert ratio(table((LN2, 2 * LN2), (LN2, 3 * LN2), (LN2, LN2)), "retain").agg_value == pytest.approx(
        0.25, abs=1e-12
    )


def test_truth_ratio_takes_the_plain_answer_without_a_paraphrase():
    """Real authors: c = exp(-ln 2), w = exp(-2 ln 2), r = 1/2."""
    facts = ScoreTable(scores(LN2), (scores(2 * LN2, 2 * LN2, 2 * LN2),))
    assert ratio(facts, "retain").column("score") == pytest.approx((0.5,), abs=1e-12)


def test_truth_ratio_of_a_collapsed_model_is_no_artefact_in_log_space():
    """60 nats everywhere: right and wrong weigh the same, r = 1. In linear space exp(-60) / 1e-10 = 8.76e-17."""
    collapsed = table((60.0,), (60.0, 60.0))
    assert ratio(collapsed, "forget").agg_value == 1.0
    theirs = ratio(collapsed, "forget", compat="open-unlearning")
    assert theirs.column("score")[0] == pytest.approx(8.7565e-17, rel=1e-4)


def test_truth_ratio_stays_finite_and_ordered_beyond_doubles():
    result = ratio(table((2000.0, 0.0), (0.0,), (2000.0,)), "forget")
    assert result.column("score") == pytest.approx((math.exp(700.0), math.exp(-700.0)))
    assert result.agg_value < 1e-300


def test_forget_quality_of_separated_scores_is_the_exact_floor():
    """Three scores all below three others: D = 1 in 2 of the C(6, 3) = 20 orders, p = 2/20."""
    assert forget_quality(ratios(1, 2, 3), ratios(4, 5, 6)).agg_value == pytest.approx(0.1, abs=1e-12)
    assert forget_quality(ratios(1, 2, 3), ratios(1, 2, 3)).agg_value == 1.0


@pytest.mark.parametrize(("rows", "floor"), [(40, 1.86e-23), (200, 1.94e-119), (400, 1.06e-239)])
def test_forget_quality_floors(rows, floor):
    result = forget_quality(ratios(*range(rows)), ratios(*range(rows, 2 * rows)))
    assert result.agg_value == pytest.approx(floor, rel=5e-3)


def test_forget_quality_needs_a_retain_log_of_the_same_kind():
    assert forget_quality(ratios(1, 2), None).agg_value is None
    with pytest.raises(ValueError, match="two kinds cannot be compared: 'log-space' and 'open-unlearning'"):
        forget_quality(ratios(1, 2), ratios(1, 2, definition="open-unlearning"))


def nine(**changed):
    values = dict.fromkeys(MODEL_UTILITY_PARTS, 0.5) | changed
    return {name: MetricResult(value, "log-space") for name, value in values.items()}


def test_model_utility_is_the_harmonic_mean():
    """Eight of 1/2 and one of 1/4: 9 / (8 * 2 + 4) = 0.45."""
    assert model_utility(nine(wf_Q_A_ROUGE=0.25)).agg_value == pytest.approx(0.45, abs=1e-12)


def test_model_utility_of_a_zero_part_is_zero_and_of_a_missing_value_none():
    assert model_utility(nine(wf_Q_A_ROUGE=0.0)).agg_value == 0.0
    assert model_utility(nine(wf_Q_A_ROUGE=None)).agg_value is None
    with pytest.raises(KeyError, match="wf_Truth_Ratio"):
        model_utility({name: result for name, result in nine().items() if name != "wf_Truth_Ratio"})


def test_rouge_by_hand():
    """Truth "the cat sat", generation "a cat sitting on the mat": the words "the" and "cat" are shared (sat and sit have other
    stems), rouge1 recall 2/3; in order only one of them, so rougeL recall is 1/3, precision 1/6, f1 2/9.
    """
    row = rouge(Generations(("q",), ("the cat sat",), ("a cat sitting on the mat",))).value_by_index[0]
    assert (row["rouge1_recall"], row["rougeL_recall"], row["rougeL_f1"]) == pytest.approx((2 / 3, 1 / 3, 2 / 9))
    assert (row["input"], row["generation"]) == ("q", "a cat sitting on the mat")


def test_rouge_stems_and_averages_recall():
    """ "books" and "book" share a stem: recall 1; an empty generation: 0; mean 1/2."""
    result = rouge(Generations(("q", "q"), ("two books", "x"), ("two book read", "")))
    assert result.agg_value == 0.5


def test_tofu_metrics_names_and_their_parts():
    rows = {"forget": table((1.0,), (2.0,)), "retain": table((1.0,), (2.0,))}
    facts = ScoreTable(scores(1.0), (scores(2.0),))
    texts = {name: Generations(("q",), ("yes",), ("yes",)) for name in ("forget", "retain", "ra", "wf")}
    derived = {name: one for name, one in metrics_of().items() if "extraction" not in name and "exact" not in name}
    found = compute_metrics(derived, Evidence(tables={**rows, "ra": facts, "wf": facts}, texts=texts))
    assert list(found) == sorted(found)
    assert len(found) == 22
    assert found["forget_quality"].agg_value is None
    assert found["forget_truth_ratio"].agg_value == pytest.approx(math.exp(-1.0))
    assert found["retain_Truth_Ratio"].agg_value == pytest.approx(1 - math.exp(-1.0))
    assert {result.definition for result in found.values()} == {definition_of(None)}


@pytest.mark.parametrize("compat", [None, "open-unlearning"])
def test_prob_mean_is_the_right_answer_s_share(compat):
    """c = 1/4 against w = 1/2, and c = 1/2 against w = 1/4: 1/3 and 2/3, mean 1/2; a collapsed model: 1/2 in log space, 0 with the 1e-10."""
    metric = TruthRatio(of="forget", kind="forget", paraphrased=True, form="prob_mean")
    pair = table((2 * LN2, LN2), (LN2,), (2 * LN2,))
    found = metric.compute(Evidence(tables={"forget": pair}, compat=compat))
    assert found.column("score") == pytest.approx((1 / 3, 2 / 3), rel=1e-9)
    assert found.agg_value == pytest.approx(0.5, rel=1e-9)
    assert found.definition == f"{definition_of(compat)}, prob_mean"
    collapsed = metric.compute(Evidence(tables={"forget": table((60.0,), (60.0,))}, compat=compat))
    assert collapsed.agg_value == pytest.approx(0.5 if compat is None else 0.0, abs=1e-15)


def test_two_forms_of_a_truth_ratio_are_not_compared():
    ratio, other = (
        TruthRatio(of="forget", kind="forget", paraphrased=True, form=form).compute(
            Evidence(tables={"forget": table((1.0,), (2.0,))})
        )
        for form in ("ratio", "prob_mean")
    )
    with pytest.raises(ValueError, match="of two kinds cannot be compared"):
        forget_quality(ratio, other)


def test_no_rows_give_none_and_nan_is_refused():
    assert answer_probability(()).agg_value is None
    with pytest.raises(ValueError, match="NaN or infinity"):
        answer_probability((AnswerScore(math.nan, math.nan, 1),))
    with pytest.raises(ValueError, match="NaN or infinity"):
        MetricResult(0.5, "log-space", ({"prob": (0.5, math.inf)},))
