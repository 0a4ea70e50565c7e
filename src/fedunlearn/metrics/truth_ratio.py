"""Truth ratio: wrong answers against the right one (TOFU, arXiv:2401.06121, section 2.2.2; open-unlearning's definition).

With L_c the mean loss of the right answer and L_w the mean over wrong answers of their mean losses, r = exp(L_c - L_w): the
geometric mean of the wrong answers' probabilities over the right one's. (The paper takes the arithmetic mean, its code does not.)
"""

import math
from typing import Literal

import numpy as np

from fedunlearn.metrics.probability import EPSILON, mean_or_none
from fedunlearn.records.evaluation import AnswerScore, Compat, MetricResult, ScoreTable, definition_of

Kind = Literal["forget", "retain"]
LARGEST_EXPONENT = 700.0


def truth_ratio(table: ScoreTable, kind: Kind, *, compat: Compat = None) -> MetricResult:
    """Rows hold `score` = r; the right answer is the paraphrased one where the table has it, else the plain one.

    kind `forget`: mean of min(r, 1 / r) (1 where right and wrong weigh the same); `retain` (also for real authors and world
    facts): mean of max(0, 1 - r).
    Ours: in log space, exp(-|L_c - L_w|) and max(0, 1 - exp(L_c - L_w)); the stored r is held within exp(+-700), which keeps
    the order of scores. compat: w / (c + 1e-10) of c = exp(-L_c), w = exp(-L_w) and 1 / (r + 1e-10): for a model whose losses
    pass 23 nats that ratio is an artefact of the 1e-10.
    """
    pairs = [(right.avg_loss, _mean_loss(wrong)) for right, wrong in zip(table.correct, table.perturbed, strict=True)]
    scores = [_score(right, wrong, compat) for right, wrong in pairs]
    small = EPSILON if compat is not None else 0.0
    if kind == "forget":
        parts = [min(score, 1.0 / (score + small)) for score in scores]
    else:
        parts = [max(0.0, 1.0 - score) for score in scores]
    return MetricResult(mean_or_none(parts), definition_of(compat), tuple({"score": score} for score in scores))


def _mean_loss(wrong: tuple[AnswerScore, ...]) -> float:
    return float(np.mean([score.avg_loss for score in wrong], dtype=np.float64))


def _score(right: float, wrong: float, compat: Compat) -> float:
    if compat is not None:
        return math.exp(-wrong) / (math.exp(-right) + EPSILON)
    return math.exp(min(max(right - wrong, -LARGEST_EXPONENT), LARGEST_EXPONENT))
