"""Truth ratio: wrong answers against the right one (TOFU, arXiv:2401.06121, section 2.2.2; open-unlearning's definition).

With L_c the mean loss of the right answer and L_w the mean over wrong answers of their mean losses, r = exp(L_c - L_w): the
geometric mean of the wrong answers' probabilities over the right one's. (The paper takes the arithmetic mean, its code does not.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedunlearn.metrics.base import Evidence, Metric, Part, Reading
from fedunlearn.metrics.probability import EPSILON, mean_or_none
from fedunlearn.records.evaluation import AnswerScore, Compat, MetricResult, definition_of

Kind = Literal["forget", "retain"]
Form = Literal["ratio", "prob_mean"]
LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, kw_only=True)
class TruthRatio(Metric):
    """Truth ratio of a data set. kind: how it is aggregated (see truth_ratio). form: the ratio, or `prob_mean`, the right answer's share of the two.

    paraphrased: whether right is the paraphrased answer (forget, retain) or the plain one (real authors, world facts).
    """

    of: str
    kind: Kind
    paraphrased: bool
    form: Form = "ratio"

    @property
    def reads(self) -> frozenset[Reading]:
        """Right and wrong answers."""
        right = Part.PARAPHRASED if self.paraphrased else Part.PLAIN
        return frozenset({Reading(self.of, right), Reading(self.of, Part.PERTURBED)})

    def definition(self, compat: Compat) -> str:
        """The form stands in the name."""
        return definition_of(compat) if self.form == "ratio" else f"{definition_of(compat)}, {self.form}"

    def compute(self, found: Evidence) -> MetricResult:
        """None where there are no wrong answers."""
        table, name = found.tables[self.of], self.definition(found.compat)
        if not table.compares:
            return MetricResult(None, name)
        right = table.paraphrased if self.paraphrased else table.plain
        if self.form == "prob_mean":
            return prob_mean(right, table.perturbed, name, compat=found.compat)
        return truth_ratio(right, table.perturbed, self.kind, compat=found.compat)


def truth_ratio(
    correct: tuple[AnswerScore, ...], wrong: tuple[tuple[AnswerScore, ...], ...], kind: Kind, *, compat: Compat = None
) -> MetricResult:
    """Rows hold `score` = r.

    kind `forget`: mean of min(r, 1 / r) (1 where right and wrong weigh the same); `retain` (also for real authors and world
    facts): mean of max(0, 1 - r).
    Ours: in log space, exp(-|L_c - L_w|) and max(0, 1 - exp(L_c - L_w)); the stored r is held within exp(+-700), which keeps
    the order of scores. compat: w / (c + 1e-10) of c = exp(-L_c), w = exp(-L_w) and 1 / (r + 1e-10): for a model whose losses
    pass 23 nats that ratio is an artefact of the 1e-10.
    """
    scores = [_score(right, others, compat) for right, others in _losses(correct, wrong)]
    small = EPSILON if compat is not None else 0.0
    if kind == "forget":
        parts = [min(score, 1.0 / (score + small)) for score in scores]
    else:
        parts = [max(0.0, 1.0 - score) for score in scores]
    return MetricResult(mean_or_none(parts), definition_of(compat), tuple({"score": score} for score in scores))


def prob_mean(
    correct: tuple[AnswerScore, ...],
    wrong: tuple[tuple[AnswerScore, ...], ...],
    definition: str,
    *,
    compat: Compat = None,
) -> MetricResult:
    """Share of the right answer, c / (c + w), of c = exp(-L_c) and w = exp(-L_w); mean over rows, for all data sets (OpenUnlearning, arXiv:2506.12618).

    Ours: 1 / (1 + exp(L_c - L_w)). compat: c / (c + w + 1e-10).
    """
    scores = []
    for right, others in _losses(correct, wrong):
        if compat is not None:
            c, w = math.exp(-right), math.exp(-others)
            scores.append(c / (c + w + EPSILON))
        else:
            scores.append(1.0 / (1.0 + math.exp(min(right - others, LARGEST_EXPONENT))))
    return MetricResult(mean_or_none(scores), definition, tuple({"score": score} for score in scores))


def _losses(
    correct: tuple[AnswerScore, ...], wrong: tuple[tuple[AnswerScore, ...], ...]
) -> Iterator[tuple[float, float]]:
    return ((right.avg_loss, _mean_loss(others)) for right, others in zip(correct, wrong, strict=True))


def _mean_loss(wrong: tuple[AnswerScore, ...]) -> float:
    return float(np.mean([score.avg_loss for score in wrong], dtype=np.float64))


def _score(right: float, wrong: float, compat: Compat) -> float:
    if compat is not None:
        return math.exp(-wrong) / (math.exp(-right) + EPSILON)
    return math.exp(min(max(right - wrong, -LARGEST_EXPONENT), LARGEST_EXPONENT))
