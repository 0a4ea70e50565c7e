"""The stack: FLoRA (Wang et al. 2024, arXiv:2409.05976). Exact at any mix of ranks; nothing stays in the trainable factors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedunlearn.aggregation.reducers.base import ModuleCohort, Reducer


@dataclass(frozen=True)
class Stack(Reducer):
    """[p_1 s_1 B_1, ..., p_K s_K B_K][A_1; ...; A_K] leaves the adapter whole: B = 0 here, and the residual holds all of it."""

    @property
    def mixes_ranks(self) -> bool:
        """Yes: stacks have any height."""
        return True

    def residual_rank(self, ranks: Sequence[int], own: int) -> int:
        """All of it."""
        return sum(ranks)

    def reduce(self, cohort: ModuleCohort) -> tuple[torch.Tensor, torch.Tensor]:
        """See Reducer.reduce."""
        return torch.zeros_like(cohort.old.b, dtype=torch.float64), cohort.old.a.double()
