"""Norm clipping in product space (Sun et al. 2019, arXiv:1911.07963)."""

from dataclasses import dataclass

import torch

from fedunlearn.aggregation.robust.base import Robust, Weighting
from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST


@dataclass(frozen=True, kw_only=True)
class NormClipping(Robust):
    """c_k = min(1, max_norm / ||U_k||): c_k on client k's product and 1 - c_k on the old global's, so that its update has at most that norm.

    max_norm: null = the median norm of this round's updates.
    """

    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.max_norm is not None and not 0 < self.max_norm <= LARGEST:
            raise UserError(
                f"robust.max_norm={self.max_norm} must be above 0, at most 1e6, or null for the round's median norm"
            )

    def reweigh(self, weights: tuple[float, ...], gram: torch.Tensor) -> Weighting:
        """See Robust.reweigh."""
        norms = gram.diagonal().clamp_min(0).sqrt()
        bound = self.max_norm if self.max_norm is not None else float(norms.quantile(0.5))
        shares = [1.0 if norm <= bound else bound / norm for norm in norms.tolist()]
        kept = tuple(weight * share for weight, share in zip(weights, shares, strict=True))
        return Weighting(kept, sum(weight * (1 - share) for weight, share in zip(weights, shares, strict=True)))
