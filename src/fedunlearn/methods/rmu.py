"""RMU: representation misdirection (Li et al. 2024, arXiv:2403.03218)."""

from dataclasses import dataclass
from typing import Literal

import torch

from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method, check_weights
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses
from fedunlearn.seeds import seed_of


@dataclass(frozen=True, kw_only=True)
class RMU(Method):
    """F = mean_i S_i / T_i, S_i = sum over row i's label tokens of mean_d (h_it - c)^2; R the same distance to the reference's activations.

    h: output of decoder block `layer` (from 0; null: the smaller of 7 and half the blocks) at the labels' own positions. c = steering u / ||u||, u
    uniform on [0, 1)^d by the run's seed: the same on every client, in every round. The forward stops at that block and nothing of the base is
    trained. The common implementation divides [B] by [B, 1], a B x B mean, which is ours only at one row, or where all rows have as many labels. One row of two tokens, d = 1, h = (1, 3), c = 2:
    S = 1 + 1, F = 1. retain: `activations`, or nll or kl at the model's end.
    """

    layer: int | None = None
    steering: float = 2.0
    gamma: float = 1.0
    alpha: float = 1.0
    retain: Literal["activations", "nll", "kl", "none"] = "activations"

    def __post_init__(self) -> None:
        check_weights("RMU", self.gamma, self.alpha, self.retain)
        faults = []
        if self.layer is not None and self.layer < 0:
            faults.append(
                f"method.layer={self.layer} of RMU must not be negative: blocks count from 0 (null: the smaller of 7 and half of them)"
            )
        if self.steering <= 0:
            faults.append(f"method.steering={self.steering} of RMU must be above 0")
        if faults:
            raise UserError(*faults)

    def hidden_layer(self, num_layers: int) -> int:
        """See Method.hidden_layer."""
        if self.layer is None:
            return min(7, num_layers // 2)
        if self.layer >= num_layers:
            raise UserError(
                f"method.layer={self.layer} of RMU: the model has blocks 0 to {num_layers - 1}; choose one of them, or null"
            )
        return self.layer

    @property
    def needs(self) -> frozenset[Need]:
        """Hidden states."""
        return frozenset({Need.HIDDEN})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.forget."""
        hidden = batch.the(Need.HIDDEN)  # [N, d]
        return _distance(batch, totals, self.target(hidden.shape[-1], totals.seed).to(hidden))

    def target(self, size: int, seed: int) -> torch.Tensor:
        """Gives c, [size] float32, of a run of that seed."""
        direction = torch.rand(size, generator=torch.Generator().manual_seed(seed_of("rmu", seed)))
        target: torch.Tensor = self.steering * direction / direction.norm()
        return target

    @property
    def retain_needs(self) -> frozenset[Need]:
        """Hidden states of both, or what the term at the model's end reads."""
        return frozenset({Need.HIDDEN, Need.REFERENCE_HIDDEN}) if self.retain == "activations" else super().retain_needs

    def retain_loss(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        """See Method.retain_loss."""
        if self.retain != "activations":
            return super().retain_loss(batch, totals)
        return _distance(batch, totals, batch.the(Need.REFERENCE_HIDDEN))


def _distance(batch: TokenLosses, totals: StepTotals, target: torch.Tensor) -> torch.Tensor:
    """Gives this micro-batch's share of mean_i S_i / T_i."""
    each = (batch.the(Need.HIDDEN) - target).square().mean(-1)  # [N]
    return (batch.sum_by_row(each) / batch.num_labels).sum() / totals.num_rows
