"""SimNPO: NPO without a reference, normalised by length (Fan et al. 2024, arXiv:2410.07163)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method, RetainTerm, check_weights
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class SimNPO(Method):
    """F = -(2/beta) mean_i log sigmoid(beta (NLL_i / T_i - delta)).

    delta stands inside beta, as in open-unlearning's code; the paper's margin stands outside it and equals beta * delta.
    With a large beta the sigmoid saturates once the mean loss is about 1 and the loss stalls there. One row of two tokens with nll 0 and ln 4, at
    beta 2 and delta 0: the mean is ln 2, sigmoid(2 ln 2) = 4/5, F = -ln(4/5) = ln(5/4), gradient -1/5 for each token.
    """

    beta: float = 4.5
    delta: float = 0.0
    gamma: float = 0.125
    alpha: float = 1.0
    retain: RetainTerm = "nll"

    def __post_init__(self) -> None:
        check_weights("SimNPO", self.gamma, self.alpha, self.retain)
        if self.beta <= 0:
            raise UserError(f"method.beta={self.beta} of SimNPO must be above 0")

    @property
    def needs(self) -> frozenset[Need]:
        """The token losses."""
        return frozenset({Need.NLL})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        mean = batch.row_sums() / batch.num_labels  # [B]
        return -(2.0 / self.beta) * F.logsigmoid(self.beta * (mean - self.delta)).sum() / totals.num_rows
