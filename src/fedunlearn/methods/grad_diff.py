"""Gradient difference: ascent on the forget rows, descent on retain rows (Liu et al. 2022, arXiv:2203.12817)."""

from dataclasses import dataclass

import torch

from fedunlearn.methods.base import Method, RetainTerm, check_weights
from fedunlearn.methods.retain import cross_entropy
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class GradDiff(Method):
    """F = -CE(forget); L = gamma F + alpha R.

    Two forget tokens with nll 1 and 3: F = -(1 + 3) / 2 = -2, gradient -1/2 for each. Beside two retain tokens with nll 1 and 2, at gamma 2 and
    alpha 1: L = 2 (-2) + 3/2 = -5/2.
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"

    def __post_init__(self) -> None:
        check_weights("GradDiff", self.gamma, self.alpha, self.retain)

    @property
    def needs(self) -> frozenset[Need]:
        """The token losses."""
        return frozenset({Need.NLL})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        return -cross_entropy(batch, totals)
