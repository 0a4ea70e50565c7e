"""Krum and Multi-Krum (Blanchard et al. 2017, arXiv:1703.02757) over product updates."""

from dataclasses import dataclass

import torch

from fedunlearn.aggregation.robust.base import Robust, Weighting, squared_distances
from fedunlearn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Krum(Robust):
    """Keeps the update whose K - f - 2 nearest neighbours are nearest (squared distances summed), f = num_malicious. Wants K >= 2 f + 3."""

    num_malicious: int = 1

    def __post_init__(self) -> None:
        check_malicious(self.num_malicious)

    @property
    def min_updates(self) -> int:
        """2 f + 3."""
        return 2 * self.num_malicious + 3

    def reweigh(self, weights: tuple[float, ...], gram: torch.Tensor) -> Weighting:
        """See Robust.reweigh."""
        best = ranked(gram, self.num_malicious)[0]
        return Weighting(tuple(1.0 if k == best else 0.0 for k in range(len(weights))))


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Robust):
    """Keeps the num_selected best by Krum's score and averages them by their weights; null = K - num_malicious - 2."""

    num_malicious: int = 1
    num_selected: int | None = None

    def __post_init__(self) -> None:
        check_malicious(self.num_malicious)
        if self.num_selected is not None and self.num_selected < 1:
            raise UserError(
                f"robust.num_selected={self.num_selected} must be at least 1, or null for K - num_malicious - 2"
            )

    @property
    def min_updates(self) -> int:
        """2 f + 3, and no fewer than are selected."""
        return max(2 * self.num_malicious + 3, self.num_selected or 0)

    def reweigh(self, weights: tuple[float, ...], gram: torch.Tensor) -> Weighting:
        """See Robust.reweigh."""
        count = self.num_selected if self.num_selected is not None else len(weights) - self.num_malicious - 2
        chosen = set(ranked(gram, self.num_malicious)[:count])
        total = sum(weight for k, weight in enumerate(weights) if k in chosen)
        if total == 0:  # weights by product norm, and the chosen ones hold nothing: they count equally
            return Weighting(tuple(1 / len(chosen) if k in chosen else 0.0 for k in range(len(weights))))
        return Weighting(tuple(weight / total if k in chosen else 0.0 for k, weight in enumerate(weights)))


def check_malicious(count: int) -> None:
    """Raises UserError for a negative number of malicious clients."""
    if count < 0:
        raise UserError(f"robust.num_malicious={count} must not be negative")


def ranked(gram: torch.Tensor, num_malicious: int) -> list[int]:
    """Gives the updates from the lowest Krum score up; ties go to the lower client id.

    Raises ValueError where K < 2 f + 3: the caller waits for more updates.
    """
    count = len(gram)
    if count < 2 * num_malicious + 3:
        raise ValueError(f"Krum wants at least {2 * num_malicious + 3} updates, got {count}")
    others = squared_distances(gram).fill_diagonal_(float("inf"))
    scores = others.sort(dim=1).values[:, : count - num_malicious - 2].sum(dim=1)
    return sorted(range(count), key=lambda k: (float(scores[k]), k))
