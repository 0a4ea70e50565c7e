"""Gradient ascent on the forget rows, nothing else."""

from dataclasses import dataclass, field

import torch

from fedunlearn.methods.base import Method, RetainTerm
from fedunlearn.methods.retain import cross_entropy
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class GradAscent(Method):
    """F = -CE(forget), no retain term: the loss has no lower bound and the model collapses when it runs on.

    Two tokens with nll 1 and 3: F = -(1 + 3) / 2 = -2, gradient -1/2 for each.
    """

    gamma: float = field(default=1.0, init=False)
    alpha: float = field(default=0.0, init=False)
    retain: RetainTerm = field(default="none", init=False)

    @property
    def needs(self) -> frozenset[Need]:
        """The token losses."""
        return frozenset({Need.NLL})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        return -cross_entropy(batch, totals)
