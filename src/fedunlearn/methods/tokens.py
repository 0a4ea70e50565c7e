"""What a loss may read of one micro-batch, and what the micro-batches of one optimiser step share."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

Memory = Mapping[str, float]
"""Scalars by name that a client keeps from round to round of one request."""


class Need(StrEnum):
    """What a loss reads beside rows and labels; the loop computes no more than is declared.

    HIDDEN alone stops the forward at the method's layer. REFERENCE_*: of the model as it was when unlearning began.
    ALTERNATES: the same rows with other answers, with token losses (and reference sums) of their own.
    """

    NLL = "nll"
    LOGITS = "logits"
    HIDDEN = "hidden"
    REFERENCE_SUMS = "reference_sums"
    REFERENCE_LOGITS = "reference_logits"
    REFERENCE_HIDDEN = "reference_hidden"
    ALTERNATES = "alternates"


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """The N label tokens of one micro-batch of B rows, row after row; prompt and padding are not in it.

    row: [N] int64, the token's row in the micro-batch. labels: [N] int64, the tokens. num_labels: [B] int64, T_i.
    nll: [N] float32, negative log-likelihood a label token (closing token included). logits: [N, V] float32, those that predict the labels.
    hidden: [N, d] float32, output of the method's layer at the labels' own positions. reference_sums: [B] float32, NLL_i under the reference.
    What was not declared is None; `the` reads it or says so.
    """

    row: torch.Tensor
    labels: torch.Tensor
    num_labels: torch.Tensor
    nll: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    reference_sums: torch.Tensor | None = None
    reference_logits: torch.Tensor | None = None
    reference_hidden: torch.Tensor | None = None
    alternates: "TokenLosses | None" = None

    def the(self, need: Need) -> torch.Tensor:
        """Gives the tensor of that need. Raises ValueError where it was not declared, hence not computed."""
        tensor = getattr(self, need.value)
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{need.value} was not computed: the method or retain term must declare Need.{need.name}")
        return tensor

    @property
    def other(self) -> "TokenLosses":
        """The same rows with their alternate answers. Raises ValueError where Need.ALTERNATES was not declared."""
        if self.alternates is None:
            raise ValueError("alternates were not computed: the method must declare Need.ALTERNATES")
        return self.alternates

    def row_sums(self) -> torch.Tensor:
        """NLL_i = sum_t nll_it, [B] float32, with gradient."""
        return self.sum_by_row(self.the(Need.NLL))

    def sum_by_row(self, values: torch.Tensor) -> torch.Tensor:
        """Adds [N] values up by row, [B]."""
        return torch.zeros_like(self.num_labels, dtype=values.dtype).index_add(0, self.row, values)


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What every micro-batch of one optimiser step shares: T_i of all its rows, so that the parts add up to its mean, and the run's seed."""

    num_labels: tuple[int, ...]
    seed: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return len(self.num_labels)

    @property
    def num_tokens(self) -> int:
        """Label tokens of the step."""
        return sum(self.num_labels)


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """What a method may remember of an optimiser step: R of the whole step (None without a retain term), its forget rows, and how many the client has."""

    retain: float | None
    num_rows: int
    num_forget: int
