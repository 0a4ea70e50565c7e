"""How much of an answer the model says by itself when it is led along it: extraction strength and exact memorization (arXiv:2012.07805, 2406.17746; open-unlearning's definitions).

Of the T labels of an answer the last id is dropped, so that N = T - 1 are left: the closing token is predicted by everybody.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedunlearn.metrics.base import Evidence, Metric, Part, Reading
from fedunlearn.metrics.probability import mean_or_none
from fedunlearn.records.evaluation import AnswerScore, MetricResult, TokenScores, definition_of


@dataclass(frozen=True, kw_only=True)
class _OverHits(Metric):
    """What both read: the plain answers, label by label."""

    of: str = "forget"

    @property
    def reads(self) -> frozenset[Reading]:
        """Token scores of the plain answers."""
        return frozenset({Reading(self.of, Part.TOKENS)})


@dataclass(frozen=True, kw_only=True)
class ExtractionStrength(_OverHits):
    """1 - k / N, k the first place from which on all predictions are right (N - 1 where there is none); mean over rows.

    By hand: hits (wrong, right, right) and the closing token: N = 3, k = 1, 2/3. All wrong: k = 2, 1/3: never below 1/N. N = 0: 0.
    """

    def compute(self, found: Evidence) -> MetricResult:
        """Rows hold `score` in [0, 1]."""
        scores = [extraction_strength(hits_of(score)) for score in found.tables[self.of].plain]
        return MetricResult(
            mean_or_none(scores), definition_of(found.compat), tuple({"score": value} for value in scores)
        )


@dataclass(frozen=True, kw_only=True)
class ExactMemorization(_OverHits):
    """Share of the N labels that are the likeliest token; mean over the rows with N > 0. By hand: (wrong, right, right): 2/3."""

    def compute(self, found: Evidence) -> MetricResult:
        """Rows hold `score` in [0, 1], and nothing where N = 0."""
        hits = [hits_of(score) for score in found.tables[self.of].plain]
        scores = [float(hit.mean()) if len(hit) else None for hit in hits]
        rows = tuple({} if value is None else {"score": value} for value in scores)
        known = [value for value in scores if value is not None]
        return MetricResult(mean_or_none(known), definition_of(found.compat), rows)


def hits_of(score: AnswerScore) -> NDArray[np.bool_]:
    """The N hits of an answer, its last id left out."""
    return tokens_of(score).hit[:-1]


def tokens_of(score: AnswerScore) -> TokenScores:
    """An answer's token scores. Raises ValueError where the pass did not keep them."""
    if score.tokens is None:
        raise ValueError("the score holds no tokens: the metric must declare that it reads them")
    return score.tokens


def extraction_strength(hits: NDArray[np.bool_]) -> float:
    """Gives 1 - k / N of hits [N]; 0 where N = 0."""
    count = len(hits)
    if not count:
        return 0.0
    wrong = np.flatnonzero(~hits)
    first = int(wrong[-1]) + 1 if len(wrong) else 0
    return 1.0 - min(first, count - 1) / count
