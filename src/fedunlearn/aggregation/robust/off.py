"""No robust re-weighting: the weights as they are."""

from dataclasses import dataclass

import torch

from fedunlearn.aggregation.robust.base import Robust, Weighting


@dataclass(frozen=True, kw_only=True)
class Off(Robust):
    """Trusts every update that passed the gate."""

    @property
    def reads_gram(self) -> bool:
        """No."""
        return False

    def reweigh(self, weights: tuple[float, ...], gram: torch.Tensor) -> Weighting:
        """See Robust.reweigh."""
        return Weighting(weights)
