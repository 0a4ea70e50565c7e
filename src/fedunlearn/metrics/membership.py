"""Membership inference: can forget rows be told from rows that nobody trained on? Each attack gives a row a score; low means `member`.

auc = area under the ROC curve with holdout as the positive class: 0.5 = cannot be told apart, 1 = the forget rows look far more like members.
Of the T labels N = T - 1 are left where the definition drops the last id (min-k, min-k++, gradnorm); losses count them all.
"""

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedunlearn.errors import UserError
from fedunlearn.metrics.base import Evidence, LogReading, Metric, Part, Reading
from fedunlearn.metrics.memorisation import tokens_of
from fedunlearn.metrics.probability import mean_or_none
from fedunlearn.records.evaluation import AnswerScore, Compat, Floats, MetricResult, ScoreTable

SMALLEST_VARIANCE = 1e-6
EPSILON = 1e-10
CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Attack(Metric):
    """An attack. forget, holdout: the data sets that are to be told apart; parts: what it reads of both."""

    forget: str = "forget"
    holdout: str = "holdout"

    @property
    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """What it reads of both data sets."""

    @property
    def float32_means(self) -> bool:
        """Whether open-unlearning takes the mean score in float32."""
        return False

    @abstractmethod
    def scores(self, table: ScoreTable) -> list[float]:
        """Gives one score a row; the lower, the more like a member."""

    @property
    def reads(self) -> frozenset[Reading]:
        """Its parts of both data sets."""
        return frozenset(Reading(name, part) for name in (self.forget, self.holdout) for part in self.parts)

    def compute(self, found: Evidence) -> MetricResult:
        """agg_value: the AUC; parts `forget` and `holdout`: mean score, and `score` of each row. None where one side has no rows."""
        both = [self.scores(found.tables[name]) for name in (self.forget, self.holdout)]
        name = self.definition(found.compat)
        sides = {
            side: MetricResult(self._mean(scores, found.compat), name, tuple({"score": score} for score in scores))
            for side, scores in zip(("forget", "holdout"), both, strict=True)
        }
        return MetricResult(auc(*both) if all(both) else None, name, parts=sides)

    def _mean(self, scores: list[float], compat: Compat) -> float | None:
        if compat is not None and self.float32_means and scores:
            return float(np.mean(np.array(scores, dtype=np.float32)))
        return mean_or_none(scores)


@dataclass(frozen=True, kw_only=True)
class LossAttack(Attack):
    """score = avg_loss, the closing token included (arXiv:1709.01604). Losses 1, 2 against holdout 3, 4: AUC 1."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Losses."""
        return (Part.PLAIN,)

    def scores(self, table: ScoreTable) -> list[float]:
        """See Attack.scores."""
        return [score.avg_loss for score in table.plain]


@dataclass(frozen=True, kw_only=True)
class ZlibAttack(Attack):
    """score = avg_loss / bytes of the zlib-compressed label text (arXiv:2012.07805). "aaa" deflates to 11 bytes: a loss of 2.2 is 0.2."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Losses and the labels as text."""
        return (Part.PLAIN, Part.LABEL_TEXT)

    def scores(self, table: ScoreTable) -> list[float]:
        """See Attack.scores."""
        pairs = zip(table.plain, table.label_texts, strict=True)
        return [score.avg_loss / len(zlib.compress(text.encode("utf-8"))) for score, text in pairs]


@dataclass(frozen=True, kw_only=True)
class MinKAttack(Attack):
    """score = minus the mean of the lowest max(1, int(N k)) log-probabilities (arXiv:2310.16789); 0 where N = 0.

    By hand, k = 0.4: log-probs -1, -3, -2 and the closing token: N = 3, int(1.2) = 1, score 3.
    """

    k: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.k <= 1:
            raise UserError(f"eval.metrics: k={self.k} of {type(self).__name__} must lie in (0, 1]")

    @property
    def parts(self) -> tuple[Part, ...]:
        """Token log-probabilities."""
        return (Part.TOKENS,)

    @property
    def float32_means(self) -> bool:
        """Yes."""
        return True

    def scores(self, table: ScoreTable) -> list[float]:
        """See Attack.scores."""
        return [lowest(self._values(score)[:-1], self.k) for score in table.plain]

    def _values(self, score: AnswerScore) -> Floats:
        return tokens_of(score).logp


@dataclass(frozen=True, kw_only=True)
class MinKPlusPlusAttack(MinKAttack):
    """min-k of (log p - mu) / sqrt(max(sigma2, 1e-6)), mu and sigma2 mean and variance of log p(v) over v ~ p (arXiv:2404.02936).

    By hand: p = (1/2, 1/2) at a position has mu = -ln 2, sigma2 = 0: the label's log-prob is mu, its score 0.
    """

    @property
    def parts(self) -> tuple[Part, ...]:
        """Token log-probabilities and their moments."""
        return (Part.MOMENTS,)

    def _values(self, score: AnswerScore) -> Floats:
        tokens = tokens_of(score)
        if tokens.mu is None or tokens.sigma2 is None:
            raise ValueError("the score holds no moments: the metric must declare that it reads them")
        values: Floats = (tokens.logp - tokens.mu) / np.sqrt(np.maximum(tokens.sigma2, SMALLEST_VARIANCE))
        return values


@dataclass(frozen=True, kw_only=True)
class ReferenceAttack(Attack):
    """score = avg_loss - avg_loss under the reference model (arXiv:1911.05965), that of eval.reference_model_path. 2.5 against 3: -0.5."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Losses under both models."""
        return (Part.PLAIN, Part.REFERENCE)

    def scores(self, table: ScoreTable) -> list[float]:
        """See Attack.scores."""
        return [mine.avg_loss - other.avg_loss for mine, other in zip(table.plain, table.reference, strict=True)]


@dataclass(frozen=True, kw_only=True)
class GradNormAttack(Attack):
    """score = mean over parameter tensors of the L2 norm of the gradient of the row's loss over its N labels (arXiv:2402.17012); evals.gradnorm computes it.

    Ours: eval mode, the loss in float32. Norms 3 and 1 of two tensors: 2.
    """

    @property
    def parts(self) -> tuple[Part, ...]:
        """Gradient norms."""
        return (Part.GRADNORM,)

    @property
    def float32_means(self) -> bool:
        """Yes."""
        return True

    def scores(self, table: ScoreTable) -> list[float]:
        """See Attack.scores."""
        return list(table.gradnorms)


@dataclass(frozen=True, kw_only=True)
class PrivLeak(Metric):
    """100 (a - b) / b of a = 1 - AUC here and b = 1 - AUC of the retain log (arXiv:2407.06460): 0 = as private as the oracle, -100 = fully leaking. By hand: .9 here, .5 there: -80.

    Ours: None without a retain log, and where b = 0. compat: the log's AUC is 0.5 where there is none, and b + 1e-10 divides.
    """

    of: str = "mia_min_k"

    @property
    def made_of(self) -> tuple[str, ...]:
        """The attack."""
        return (self.of,)

    @property
    def reads_log(self) -> LogReading:
        """The oracle's AUC."""
        return LogReading(metric=self.of, rows=False)

    def compute(self, found: Evidence) -> MetricResult:
        """No rows."""
        here, name = found.metrics[self.of].agg_value, self.definition(found.compat)
        there = None if found.retain is None else found.retain.metrics[self.of].agg_value
        if there is None and found.compat is not None:
            there = CHANCE
        if here is None or there is None or (there == 1.0 and found.compat is None):
            return MetricResult(None, name)
        b = 1.0 - there
        return MetricResult(100.0 * (1.0 - here - b) / (b + (EPSILON if found.compat is not None else 0.0)), name)


def auc(forget: Sequence[float], holdout: Sequence[float]) -> float:
    """Area under the ROC curve with holdout as the positive class: the share of pairs in which holdout scores higher, ties half (Mann-Whitney)."""
    from scipy.stats import rankdata  # as in forget_quality

    ranks = rankdata([*forget, *holdout])[len(forget) :]
    count = len(holdout)
    return float((ranks.sum() - count * (count + 1) / 2) / (count * len(forget)))


def lowest(values: Floats, k: float) -> float:
    """Minus the mean of the lowest max(1, int(N k)) of N values; 0 where N = 0."""
    if not len(values):
        return 0.0
    count = max(1, int(len(values) * k))
    return -float(np.sort(values)[:count].astype(np.float64).mean())
