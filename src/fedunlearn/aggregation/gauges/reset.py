"""FLoRA's gauge: every round begins with fresh factors."""

import torch

from fedunlearn.aggregation.factors import Factors, fresh_a
from fedunlearn.aggregation.gauges.base import Gauge, Moment


class Reset(Gauge):
    """A drawn anew as at the start of a run, the same for every client; B zero, as the stack left it."""

    @property
    def keeps_place(self) -> bool:
        """No: nothing stays."""
        return False

    def refactor(
        self, b: torch.Tensor, a: torch.Tensor, old: Factors, moment: Moment
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Gauge.refactor."""
        return b, fresh_a(a.shape, moment.generator).double()
