"""SatImp: ascent weighted by saturation and importance (Yang et al. 2025, arXiv:2505.11953)."""

from dataclasses import dataclass

import torch

from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method, RetainTerm, check_weights
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class SatImp(Method):
    """F = -sum sg(p^beta1 (1 - p)^beta2) nll / sum T, p = exp(-nll).

    beta1, beta2 >= 0: with beta2 = 0 it is WGA, with both 0 gradient ascent. gamma and alpha are those of the published yaml; the authors'
    README has 1 and 0.1. Two tokens with p = 1/2 and 1/4 at beta1 = beta2 = 1: F = -(ln 2 / 4 + 3 ln 4 / 16) / 2 = -5 ln(2) / 16.
    """

    beta1: float = 5.0
    beta2: float = 1.0
    gamma: float = 0.1
    alpha: float = 1.0
    retain: RetainTerm = "nll"

    def __post_init__(self) -> None:
        check_weights("SatImp", self.gamma, self.alpha, self.retain)
        for key in ("beta1", "beta2"):
            if getattr(self, key) < 0:
                raise UserError(f"method.{key}={getattr(self, key)} of SatImp must not be negative")

    @property
    def needs(self) -> frozenset[Need]:
        """The token losses."""
        return frozenset({Need.NLL})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        nll = batch.the(Need.NLL)
        fixed = nll.detach()
        # 1 - p by expm1: near p = 1 the difference itself would be rounding
        weight = torch.exp(-self.beta1 * fixed) * (-torch.expm1(-fixed)).pow(self.beta2)
        return -(weight * nll).sum() / totals.num_tokens
