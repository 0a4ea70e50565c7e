"""Attacks and memorisation on answers of three labels and the closing one, worked out by hand."""

import math
import zlib

import numpy as np
import pytest

from fedunlearn.errors import UserError
from fedunlearn.metrics.base import Evidence, compute_metrics, in_order
from fedunlearn.metrics.forget_quality import ForgetQuality
from fedunlearn.metrics.membership import (
    GradNormAttack,
    LossAttack,
    MinKAttack,
    MinKPlusPlusAttack,
    PrivLeak,
    ReferenceAttack,
    ZlibAttack,
    auc,
    lowest,
)
from fedunlearn.metrics.memorisation import ExactMemorization, ExtractionStrength
from fedunlearn.metrics.model_utility import ModelUtility
from fedunlearn.records.evaluation import AnswerScore, MetricResult, ScoreTable, TokenScores


def answer(logp, hit=None, mu=None, sigma2=None):
    """An answer by its labels' log-probabilities, the closing one last."""
    logp = np.array(logp, dtype=np.float64)
    hit = np.zeros(len(logp), dtype=bool) if hit is None else np.array(hit, dtype=bool)
    moments = [None if column is None else np.array(column, dtype=np.float64) for column in (mu, sigma2)]
    loss = -float(logp.mean())
    return AnswerScore(loss, math.exp(-loss), len(logp), TokenScores(logp, hit, *moments))


def tables(forget, holdout):
    return Evidence(tables={"forget": ScoreTable(plain=tuple(forget)), "holdout": ScoreTable(plain=tuple(holdout))})


class TestMemorisation:
    @pytest.mark.parametrize(
        ("hits", "strength", "exact"),
        [
            ((1, 1, 1, 0), 1.0, 1.0),  # the closing label does not count
            ((0, 1, 1, 1), 2 / 3, 2 / 3),
            ((1, 1, 0, 1), 1 / 3, 2 / 3),
            ((0, 0, 0, 1), 1 / 3, 0.0),  # never below 1/N
            ((1, 0, 1, 1), 1 / 3, 2 / 3),
        ],
    )
    def test_of_three_labels(self, hits, strength, exact):
        found = tables([answer((-1.0,) * 4, hits)], [])
        assert ExtractionStrength().compute(found).agg_value == pytest.approx(strength, rel=1e-12)
        assert ExactMemorization().compute(found).agg_value == pytest.approx(exact, rel=1e-12)

    def test_an_answer_of_the_closing_label_alone_has_strength_0_and_no_share(self):
        found = tables([answer((-1.0,), (1,)), answer((-1.0, -1.0), (1, 0))], [])
        assert ExtractionStrength().compute(found).column("score") == (0.0, 1.0)
        exact = ExactMemorization().compute(found)
        assert (exact.agg_value, list(exact.value_by_index)) == (1.0, [{}, {"score": 1.0}])


class TestAttacks:
    def test_loss_counts_the_closing_label(self):
        """(1 + 3 + 2 + 2) / 4 = 2 against (1 + 1 + 1 + 1) / 4: the only pair is the wrong way round."""
        found = LossAttack().compute(tables([answer((-1, -3, -2, -2))], [answer((-1,) * 4)]))
        assert found.agg_value == 0.0
        assert found.parts["forget"].column("score") == (2.0,)
        assert found.parts["holdout"].agg_value == 1.0

    def test_zlib_divides_by_the_bytes_of_the_label_text(self):
        table = ScoreTable(plain=(answer((-1, -3, -2, -2)),), label_texts=("aaa",))
        assert ZlibAttack().scores(table) == [2.0 / len(zlib.compress(b"aaa"))] == [2.0 / 11]

    def test_min_k_takes_the_lowest_share_of_all_but_the_closing_label(self):
        """N = 3: k = .4 takes int(1.2) = 1, k = .7 two, k = 1 three; -9 of the closing label is never seen."""
        table = ScoreTable(plain=(answer((-1, -3, -2, -9)),))
        assert [MinKAttack(k=k).scores(table) for k in (0.1, 0.4, 0.7, 1.0)] == [[3.0], [3.0], [2.5], [2.0]]

    def test_min_k_plus_plus_standardises_and_floors_the_variance(self):
        """(-1 + 1) / 2 = 0, (-3 + 1) / 1 = -2, (-2 + 1) / sqrt(1e-6) = -1000: the lowest one is 1000, the lowest two 501."""
        table = ScoreTable(plain=(answer((-1, -3, -2, 0), mu=(-1, -1, -1, 0), sigma2=(4, 1, 0, 1)),))
        assert MinKPlusPlusAttack(k=0.4).scores(table) == pytest.approx([1000.0])
        assert MinKPlusPlusAttack(k=0.7).scores(table) == pytest.approx([501.0])

    def test_no_label_beside_the_closing_one_scores_0(self):
        table = ScoreTable(plain=(answer((-1,), mu=(0,), sigma2=(1,)),))
        assert MinKAttack().scores(table) == MinKPlusPlusAttack().scores(table) == [0.0]

    def test_reference_and_gradient_norm_read_their_columns(self):
        table = ScoreTable(plain=(answer((-2.5,)),), reference=(answer((-3.0,)),), gradnorms=(2.0,))
        assert ReferenceAttack().scores(table) == [-0.5]
        assert GradNormAttack().scores(table) == [2.0]

    def test_an_attack_that_reads_tokens_which_nobody_kept_says_so(self):
        with pytest.raises(ValueError, match="must declare that it reads them"):
            MinKAttack().scores(ScoreTable(plain=(AnswerScore(1.0, 0.5, 4),)))

    @pytest.mark.parametrize("k", [0.0, -1.0, 1.5, math.nan])
    def test_a_share_without_sense_is_refused(self, k):
        with pytest.raises(UserError, match=r"k=.* of MinKAttack must lie in \(0, 1\]"):
            MinKAttack(k=k)

    @pytest.mark.parametrize(
        ("forget", "holdout", "area"),
        [((1, 2), (3, 4), 1.0), ((3, 4), (1, 2), 0.0), ((1, 2), (1, 2), 0.5), ((1, 3), (2,), 0.5), ((1,), (1,), 0.5)],
    )
    def test_area_under_the_curve_is_the_share_of_pairs(self, forget, holdout, area):
        assert auc(forget, holdout) == area

    def test_the_lowest_share_is_averaged_in_float64(self):
        values = np.array([-1e8, -1.0, -1.0, 0.0], dtype=np.float32)
        assert lowest(values, 0.75) == pytest.approx((1e8 + 2) / 3, rel=1e-15)

    def test_one_side_without_rows_has_no_area(self):
        found = LossAttack().compute(tables([answer((-1.0,))], []))
        assert (found.agg_value, found.parts["holdout"].agg_value) == (None, None)


class TestPrivacyLeakage:
    """AUC .9 here and .5 there: a = .1, b = .5, -80. An oracle whose AUC is 1 has no leakage to compare with."""

    @pytest.mark.parametrize(("there", "leak"), [(0.5, -80.0), (0.9, 0.0), (0.95, 100.0), (1.0, None), (None, None)])
    def test_by_hand(self, there, leak):
        from fedunlearn.records.evaluation import EvalLog

        here = {"mia_min_k": MetricResult(0.9, "log-space")}
        log = None if there is None else EvalLog({"mia_min_k": MetricResult(there, "log-space")}, {})
        found = PrivLeak().compute(Evidence(tables={}, metrics=here, retain=log))
        assert found.agg_value == (None if leak is None else pytest.approx(leak, abs=1e-9))


class TestOrder:
    def test_a_metric_stands_after_those_it_is_made_of(self):
        chosen = {"privleak": PrivLeak(of="mine"), "mine": MinKAttack()}
        assert list(in_order(chosen)) == ["mine", "privleak"]

    def test_a_part_that_is_not_composed_is_named_with_the_way_out(self):
        with pytest.raises(
            UserError,
            match=r"eval\.metrics\.model_utility is made of 'retain_Q_A_Prob', .*~eval\.metrics\.model_utility",
        ):
            in_order({"model_utility": ModelUtility()})

    def test_a_circle_is_refused(self):
        with pytest.raises(UserError, match=r"a -> b -> a is a circle"):
            in_order({"a": ForgetQuality(of="b"), "b": ForgetQuality(of="a")})

    def test_no_metrics_are_no_results(self):
        assert compute_metrics({}, Evidence(tables={})) == {}
