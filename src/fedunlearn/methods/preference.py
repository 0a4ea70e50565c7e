"""What the preference losses share: one formula, and other answers that each takes from elsewhere (Rafailov et al. 2023, arXiv:2305.18290)."""

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedunlearn.errors import UserError
from fedunlearn.methods.alternates import Alternates
from fedunlearn.methods.base import Method, RetainTerm, check_weights
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class Preference(Method):
    """F = -(2/beta) mean_i log sigmoid(beta [(NLL_i - NLL_i^ref)(original) - (NLL_i - NLL_i^ref)(alternate)]), on sequence sums.

    It lowers the alternate's loss and raises the original's. 2/beta is the common implementation's, the paper has 1. As beta goes to 0 its gradient
    becomes that of ascent on the original and descent on the alternate. At the reference, whatever the rows: F = (2/beta) ln 2, and
    a token's gradient -1/B (original) or 1/B (alternate). Members say where their alternates come from, and nothing else.
    """

    beta: float = 0.1
    gamma: float = 1.0
    alpha: float = 1.0
    retain: RetainTerm = "nll"

    def __post_init__(self) -> None:
        check_weights(type(self).__name__, self.gamma, self.alpha, self.retain)
        if self.beta <= 0:
            raise UserError(f"method.beta={self.beta} of {type(self).__name__} must be above 0")
        # Made once now, for its checks: a member's values without sense are refused here, not on a client.
        _ = self.alternates

    @property
    @abstractmethod
    def alternates(self) -> Alternates:
        """Where the answers of Need.ALTERNATES come from."""

    @property
    def needs(self) -> frozenset[Need]:
        """Token losses and reference sums of the rows with both answers."""
        return frozenset({Need.NLL, Need.REFERENCE_SUMS, Need.ALTERNATES})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        original = batch.row_sums() - batch.the(Need.REFERENCE_SUMS)  # [B]
        alternate = batch.other.row_sums() - batch.other.the(Need.REFERENCE_SUMS)
        return -(2.0 / self.beta) * F.logsigmoid(self.beta * (original - alternate)).sum() / totals.num_rows
