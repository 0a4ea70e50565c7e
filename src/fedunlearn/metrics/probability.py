"""Probability of an answer, per token: prob = exp(-avg_loss) (TOFU, arXiv:2401.06121, section 2.2.2), and its normalised kind."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedunlearn.metrics.base import Evidence, Metric, Part, Reading
from fedunlearn.records.evaluation import AnswerScore, Compat, MetricResult, Row, definition_of

EPSILON = 1e-10


@dataclass(frozen=True, kw_only=True)
class Probability(Metric):
    """Probability of a data set's answers: the plain ones (`*_Q_A_Prob`), the paraphrased (`*_Q_A_PARA_Prob`) or the wrong ones (`*_Q_A_PERT_Prob`)."""

    of: str
    answers: Literal["plain", "paraphrased", "perturbed"] = "plain"

    @property
    def reads(self) -> frozenset[Reading]:
        """These answers."""
        return frozenset({Reading(self.of, Part(self.answers))})

    def compute(self, found: Evidence) -> MetricResult:
        """See answer_probability and perturbed_probability; None where the data set has no such answers."""
        table, compat = found.tables[self.of], found.compat
        if self.answers == "perturbed":
            wrong = table.perturbed if table.compares else ()
            return perturbed_probability(wrong, compat=compat)
        return answer_probability(table.plain if self.answers == "plain" else table.paraphrased, compat=compat)


@dataclass(frozen=True, kw_only=True)
class NormalisedProbability(Metric):
    """Share of the right answer among right and wrong ones (`ra_Q_A_Prob_normalised`, `wf_...`)."""

    of: str

    @property
    def reads(self) -> frozenset[Reading]:
        """Plain and wrong answers."""
        return frozenset({Reading(self.of, Part.PLAIN), Reading(self.of, Part.PERTURBED)})

    def compute(self, found: Evidence) -> MetricResult:
        """See normalised_probability; None where there are no wrong answers."""
        table = found.tables[self.of]
        if not table.compares:
            return MetricResult(None, definition_of(found.compat))
        return normalised_probability(table.plain, table.perturbed, compat=found.compat)


def answer_probability(scores: tuple[AnswerScore, ...], *, compat: Compat = None) -> MetricResult:
    """Mean over rows of prob_i in [0, 1]; rows hold `prob` and `avg_loss`. None where there is no row."""
    rows: tuple[Row, ...] = tuple({"prob": score.prob, "avg_loss": score.avg_loss} for score in scores)
    return MetricResult(mean_or_none([score.prob for score in scores]), definition_of(compat), rows)


def perturbed_probability(scores: tuple[tuple[AnswerScore, ...], ...], *, compat: Compat = None) -> MetricResult:
    """Mean over rows of the mean over a row's wrong answers; rows hold one list of `prob` and one of `avg_loss`."""
    rows: tuple[Row, ...] = tuple(
        {"prob": tuple(score.prob for score in row), "avg_loss": tuple(score.avg_loss for score in row)}
        for row in scores
    )
    means = [float(np.mean([score.prob for score in row], dtype=np.float64)) for row in scores]
    return MetricResult(mean_or_none(means), definition_of(compat), rows)


def normalised_probability(
    correct: tuple[AnswerScore, ...], wrong: tuple[tuple[AnswerScore, ...], ...], *, compat: Compat = None
) -> MetricResult:
    """Share of the right answer among right and wrong ones: p / (p + sum_k p_k); mean over rows, rows hold `prob`.

    Ours: 1 / (1 + sum_k exp(L - L_k)) from the losses, in log space, where nothing underflows: a model that gives all answers
    the same tiny probability gets 1 / (1 + K). compat: p / (p + sum_k p_k + 1e-10) from the stored probabilities, which is 0 there.
    """
    values = [_normalised(right, others, compat) for right, others in zip(correct, wrong, strict=True)]
    return MetricResult(mean_or_none(values), definition_of(compat), tuple({"prob": value} for value in values))


def mean_or_none(values: list[float]) -> float | None:
    """Mean in float64, or None of no values."""
    return float(np.mean(values, dtype=np.float64)) if values else None


def _normalised(right: AnswerScore, others: tuple[AnswerScore, ...], compat: Compat) -> float:
    if compat is not None:
        return right.prob / (right.prob + sum(other.prob for other in others) + EPSILON)
    losses = np.array([right.avg_loss, *(other.avg_loss for other in others)], dtype=np.float64)
    weights = np.exp(losses.min() - losses)
    return float(weights[0] / weights.sum())
