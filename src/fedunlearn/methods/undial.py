"""UNDIAL: self-distillation from the reference with the label's logit lowered (Dong et al. 2025, arXiv:2402.10052)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method, RetainTerm, check_weights
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class UNDIAL(Method):
    """F = mean over label positions of -sum_v q_v log softmax(z)_v, q = softmax(z_ref - beta onehot(y)).

    Here the mean is over label positions; the common implementation takes it over prompt and padding too, where it also reads the label -100 as
    the token V - 100, so learning rates found with it do not carry over. beta = 0 distils the reference itself; as it grows q leaves the label out.
    Two tokens over two words at beta = ln 3, z = z_ref. (0, 0) with y = 0: q = (1/4, 3/4), -log softmax(z) = ln 2 for both words. (0, ln 3) with
    y = 1: q = (1/2, 1/2), softmax(z) = (1/4, 3/4). F = (ln 2 + ln(16/3) / 2) / 2, gradient (softmax(z) - q) / 2 = (1/8, -1/8) and (-1/8, 1/8).
    """

    beta: float = 10.0
    gamma: float = 1.0
    alpha: float = 0.0
    retain: RetainTerm = "none"

    def __post_init__(self) -> None:
        check_weights("UNDIAL", self.gamma, self.alpha, self.retain)
        if self.beta < 0:
            raise UserError(f"method.beta={self.beta} of UNDIAL must not be negative (0 distils the reference)")

    @property
    def needs(self) -> frozenset[Need]:
        """The model's logits and the reference's."""
        return frozenset({Need.LOGITS, Need.REFERENCE_LOGITS})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        label = batch.labels[:, None]
        lowered = batch.the(Need.REFERENCE_LOGITS)
        lowered = lowered.scatter(-1, label, lowered.gather(-1, label) - self.beta)
        return F.cross_entropy(batch.the(Need.LOGITS), lowered.softmax(-1), reduction="sum") / totals.num_tokens
