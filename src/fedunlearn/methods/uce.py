"""UCE: the unlearning cross-entropy of FedOSD (Pan et al. 2025, arXiv:2412.20200)."""

from dataclasses import dataclass

import torch

from fedunlearn.methods.base import Method, RetainTerm, check_weights
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class UCE(Method):
    """F = mean over label positions of -log(1 - p/2), p = exp(-nll): at most log 2, and flat where nothing is known any more.

    As p goes to 1 a token's gradient by nll is -1 (that of ascent), as p goes to 0 it vanishes. Two tokens with p = 1 and 2/3:
    F = (ln 2 + ln(3/2)) / 2 = ln(3) / 2. FedOSD's target has no retain term; here it has one unless it is switched off.
    """

    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"

    def __post_init__(self) -> None:
        check_weights("UCE", self.gamma, self.alpha, self.retain)

    @property
    def needs(self) -> frozenset[Need]:
        """The token losses."""
        return frozenset({Need.NLL})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        return -torch.log1p(-0.5 * torch.exp(-batch.the(Need.NLL))).sum() / totals.num_tokens
