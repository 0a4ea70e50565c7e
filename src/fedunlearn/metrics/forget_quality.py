"""Forget quality: can the truth ratios be told from those of a model that never saw the forget rows? (TOFU, arXiv:2401.06121)"""

from dataclasses import dataclass

from fedunlearn.metrics.base import Evidence, LogReading, Metric
from fedunlearn.records.evaluation import MetricResult


@dataclass(frozen=True, kw_only=True)
class ForgetQuality(Metric):
    """Forget quality from the truth ratios that the metric `of` stored here and in the retain log."""

    of: str = "forget_truth_ratio"

    @property
    def made_of(self) -> tuple[str, ...]:
        """The truth ratio."""
        return (self.of,)

    @property
    def reads_log(self) -> LogReading:
        """The oracle's truth ratios, row by row."""
        return LogReading(metric=self.of, rows=True)

    def compute(self, found: Evidence) -> MetricResult:
        """See forget_quality."""
        return forget_quality(found.metrics[self.of], None if found.retain is None else found.retain.metrics[self.of])


def forget_quality(ratio: MetricResult, retain_ratio: MetricResult | None) -> MetricResult:
    """p-value of the two-sided Kolmogorov-Smirnov test between the forget_truth_ratio scores of two models; None without a second, or without scores.

    1: cannot be told apart. The floor, all scores apart, falls with the rows: 1.86e-23 of 40, 1.94e-119 of 200, 1.06e-239 of 400.
    The test is exact at these sizes (scipy's method="auto"). Raises ValueError where the two follow different definitions.
    """
    if retain_ratio is None or not ratio.value_by_index:
        return MetricResult(None, ratio.definition)
    if ratio.definition != retain_ratio.definition:
        raise ValueError(
            f"truth ratios of two kinds cannot be compared: {ratio.definition!r} and {retain_ratio.definition!r}"
        )
    from scipy.stats import ks_2samp  # a second, which whoever merely reads a config need not wait

    test = ks_2samp(ratio.column("score"), retain_ratio.column("score"), alternative="two-sided", method="auto")
    return MetricResult(float(test.pvalue), ratio.definition)
