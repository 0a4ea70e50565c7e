"""The interface of an unlearning method, and what the training loop computes for it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch

from fedunlearn.errors import UserError


class Need(StrEnum):
    """What a loss reads beside the token losses; the loop computes no more than is declared."""

    REFERENCE_SUMS = "reference_sums"
    LOGITS = "logits"
    REFERENCE_LOGITS = "reference_logits"


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """The label tokens of one micro-batch, row after row; prompt and padding are not in it.

    nll: [N] float32, negative log-likelihood a label token (closing token included). row: [N] int64, the token's row in the
    micro-batch. num_labels: [B] int64, T_i. reference_sums: [B] float32, NLL_i under the reference. logits, reference_logits:
    [N, V] float32. What a method or retain term does not declare in `needs` is None.
    """

    nll: torch.Tensor
    row: torch.Tensor
    num_labels: torch.Tensor
    reference_sums: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    reference_logits: torch.Tensor | None = None

    def row_sums(self) -> torch.Tensor:
        """NLL_i = sum_t nll_it, [B] float32, with gradient."""
        return torch.zeros_like(self.num_labels, dtype=self.nll.dtype).index_add(0, self.row, self.nll)


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What every micro-batch of one optimiser step shares: rows and label tokens of the whole step, so that the parts add up to its mean."""

    num_rows: int
    num_tokens: int


RetainTerm = Literal["nll", "kl", "none"]


class Method(ABC):
    """A forget loss F and its weights: the total is L = gamma F + alpha R.

    Members are frozen dataclasses with the fields gamma, alpha and retain where they have a retain term.
    Law: summed over the micro-batches of a step, `forget` equals its value on the step in one batch (to rounding), for it
    divides by the step's totals, never by the micro-batch's.
    """

    gamma: float
    alpha: float
    retain: RetainTerm

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """What `forget` reads beside nll, row and num_labels."""

    @abstractmethod
    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """Gives this micro-batch's share of F, a float32 scalar with gradient."""


def check_weights(name: str, gamma: float, alpha: float, retain: RetainTerm) -> None:
    """Refuses weights without sense: raises UserError for a negative one, gamma = 0, NaN, or alpha = 0 beside a retain term."""
    if not (gamma > 0 and alpha >= 0):
        raise UserError(f"method {name}: gamma={gamma} must be above 0 and alpha={alpha} not negative")
    if alpha == 0 and retain != "none":
        raise UserError(
            f"method {name}: retain={retain!r} with alpha=0 would be computed and thrown away: set method.retain=none or alpha above 0"
        )
