"""Probability of an answer, per token: prob = exp(-avg_loss) (TOFU, arXiv:2401.06121, section 2.2.2), and its normalised kind."""

import numpy as np

from fedunlearn.records.evaluation import AnswerScore, Compat, MetricResult, Row, definition_of

EPSILON = 1e-10


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
