"""The trimmed mean (Yin et al. 2018, arXiv:1803.01498), entry by entry of the one factor that clients train."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fedunlearn.aggregation.pieces import in_pieces
from fedunlearn.aggregation.reducers.base import ModuleCohort, Reducer


@dataclass(frozen=True)
class TrimmedMean(Reducer):
    """Leaves out the floor(trim * K) largest and smallest values of every entry and takes the plain mean of the rest, at least one of them.

    Exact in product space only where one factor is the same for all clients, so a mask is asked for. Every client counts once.
    """

    trim: float

    def num_left_out(self, count: int) -> int:
        """How many of `count` values are left out at each end: fewer clients than planned may be so few that it is none."""
        return min(math.floor(self.trim * count + 1e-9), (count - 1) // 2)

    def reduce(self, cohort: ModuleCohort) -> tuple[torch.Tensor, torch.Tensor]:
        """See Reducer.reduce."""
        return self._trimmed([client.b for client in cohort.clients]), self._trimmed(
            [client.a for client in cohort.clients]
        )

    def reduce_plain(
        self, tensors: Iterable[torch.Tensor], weights: Sequence[float], old: torch.Tensor, old_weight: float
    ) -> torch.Tensor:
        """See Reducer.reduce_plain: trimmed as the factors are, or one client alone could set it."""
        return self._trimmed(tensors)

    def _trimmed(self, tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        given = list(tensors)
        drop, mean = self.num_left_out(len(given)), torch.empty(given[0].shape, dtype=torch.float64)
        for place, *theirs in in_pieces([mean, *given]):
            ordered = torch.stack(theirs).double().sort(dim=0).values
            place.copy_(ordered[drop : len(given) - drop].mean(dim=0))
        return mean
