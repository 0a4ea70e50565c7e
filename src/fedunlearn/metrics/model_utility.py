"""Model utility: what must stay, as one number (TOFU, arXiv:2401.06121): the harmonic mean of nine metrics."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedunlearn.errors import UserError
from fedunlearn.metrics.base import Evidence, Metric
from fedunlearn.records.evaluation import Compat, MetricResult, definition_of

MODEL_UTILITY_PARTS = (
    "retain_Q_A_Prob",
    "retain_Q_A_ROUGE",
    "retain_Truth_Ratio",
    "ra_Q_A_Prob_normalised",
    "ra_Q_A_ROUGE",
    "ra_Truth_Ratio",
    "wf_Q_A_Prob_normalised",
    "wf_Q_A_ROUGE",
    "wf_Truth_Ratio",
)


@dataclass(frozen=True, kw_only=True)
class ModelUtility(Metric):
    """Model utility: the harmonic mean of `parts`, which must be among eval.metrics."""

    parts: tuple[str, ...] = MODEL_UTILITY_PARTS

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("model_utility: parts=[] leaves nothing to take the mean of; name metrics, or take it out")

    @property
    def made_of(self) -> tuple[str, ...]:
        """The parts."""
        return self.parts

    def compute(self, found: Evidence) -> MetricResult:
        """See model_utility."""
        return model_utility(found.metrics, self.parts, compat=found.compat)


def model_utility(
    metrics: Mapping[str, MetricResult], parts: tuple[str, ...] = MODEL_UTILITY_PARTS, *, compat: Compat = None
) -> MetricResult:
    """Harmonic mean of the parts, in [0, 1]: 0 where one of them is 0, None where one of them is None.

    Raises KeyError where a part is missing altogether.
    """
    values = [metrics[name].agg_value for name in parts]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return MetricResult(None, definition_of(compat))
    from scipy.stats import hmean  # as in forget_quality

    utility = float(hmean(known)) if min(known) > 0.0 else 0.0
    return MetricResult(utility, definition_of(compat))
