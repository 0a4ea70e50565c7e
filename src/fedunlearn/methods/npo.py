"""Negative preference optimisation (Zhang et al. 2024, arXiv:2404.05868)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method, RetainTerm, check_weights
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class NPO(Method):
    """F = -(2/beta) mean_i log sigmoid(beta (NLL_i - NLL_i^ref)), on sequence sums.

    beta > 0: as it goes to 0, F's gradient becomes gradient ascent's on the sums. The reference is the model as it was when
    unlearning began; it is needed as one number a row. One row of two tokens with nll ln 3 and 1, reference 1, at beta 1: the margin is ln 3, its
    sigmoid 3/4, F = -2 ln(3/4) = 2 ln(4/3), gradient -1/2 for each token.
    """

    beta: float = 0.1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"

    def __post_init__(self) -> None:
        check_weights("NPO", self.gamma, self.alpha, self.retain)
        if self.beta <= 0:
            raise UserError(f"method.beta={self.beta} of NPO must be above 0")

    @property
    def needs(self) -> frozenset[Need]:
        """The token losses, and the rows' sums of them under the reference."""
        return frozenset({Need.NLL, Need.REFERENCE_SUMS})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        margin = self.beta * (batch.row_sums() - batch.the(Need.REFERENCE_SUMS))  # [B]
        return -(2.0 / self.beta) * F.logsigmoid(margin).sum() / totals.num_rows
