"""Weighted gradient ascent (Wang et al. 2025, arXiv:2502.19301)."""

from dataclasses import dataclass

import torch

from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method, RetainTerm, check_weights
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class WGA(Method):
    """F = -sum sg(p^beta) nll / sum T, p = exp(-nll): a token that is forgotten already counts little.

    beta >= 0: at 0 F is gradient ascent's. Two tokens with p = 1/2 and 1/4 at beta 1: F = -(ln 2 / 2 + ln 4 / 4) / 2 = -ln(2) / 2.
    """

    beta: float = 1.0
    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"

    def __post_init__(self) -> None:
        check_weights("WGA", self.gamma, self.alpha, self.retain)
        if self.beta < 0:
            raise UserError(f"method.beta={self.beta} of WGA must not be negative (0 is gradient ascent)")

    @property
    def needs(self) -> frozenset[Need]:
        """The token losses."""
        return frozenset({Need.NLL})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        nll = batch.the(Need.NLL)
        weight = torch.exp(-self.beta * nll.detach())
        return -(weight * nll).sum() / totals.num_tokens
