"""The weighted mean of the factors themselves: FedIT (Zhang et al. 2023, arXiv:2305.05644) and, padded, HetLoRA (Cho et al. 2024, arXiv:2401.06432)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedunlearn.aggregation.factors import padded_to
from fedunlearn.aggregation.reducers.base import ModuleCohort, Reducer, mean_of


@dataclass(frozen=True)
class FactorMean(Reducer):
    """B = sum p_k B_k, A = sum p_k A_k: not the mean of the products; what it misses is the covariance of B_k and A_k."""

    def residual_rank(self, ranks: Sequence[int], own: int) -> int:
        """That of a covariance of K terms: (K - 1) r, or K r where weight is left to the old global adapter, which then is one more term."""
        return sum(ranks)

    def reduce(self, cohort: ModuleCohort) -> tuple[torch.Tensor, torch.Tensor]:
        """See Reducer.reduce."""
        members, weights = cohort.clients, cohort.weights
        if cohort.old_weight:
            members, weights = (*members, cohort.old), (*weights, cohort.old_weight)
        return mean_of(tuple(m.b for m in members), weights), mean_of(tuple(m.a for m in members), weights)


@dataclass(frozen=True)
class PaddedFactorMean(Reducer):
    """The same over factors of different ranks, zero-padded to the largest, each carrying sqrt(s_k).

    Rank self-pruning, which HetLoRA's clients also do, is left out.
    """

    @property
    def mixes_ranks(self) -> bool:
        """Yes: by padding."""
        return True

    def reduce(self, cohort: ModuleCohort) -> tuple[torch.Tensor, torch.Tensor]:
        """See Reducer.reduce."""
        old = cohort.old
        padded = tuple(padded_to(old.rank, old.scale, client) for client in cohort.clients)
        return FactorMean().reduce(
            ModuleCohort(old=old, clients=padded, weights=cohort.weights, old_weight=cohort.old_weight)
        )
