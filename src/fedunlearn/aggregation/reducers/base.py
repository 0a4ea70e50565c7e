"""The interface of a reducer: one module of all clients in, the global factors of that module out."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fedunlearn.aggregation.factors import Factors
from fedunlearn.aggregation.product import LowRank, product_of, weighted_sum


@dataclass(frozen=True, eq=False, kw_only=True)
class ModuleCohort:
    """One module of every client that counts, in client-id order.

    old: the global factors the round began with. clients: theirs, each with its own scale and rank. weights: p_k. old_weight: what the
    weights leave for the old global adapter (1 - sum of weights where they were clipped or signed; else 0). carried: what earlier
    rounds left over (error feedback), or None. All float64.
    """

    old: Factors
    clients: tuple[Factors, ...]
    weights: tuple[float, ...]
    old_weight: float = 0.0
    carried: LowRank | None = None

    def exact(self) -> LowRank:
        """The product that averaging products gives: sum_k p_k s_k B_k A_k + old_weight s B A (+ what is carried)."""
        parts, weights = [product_of(client) for client in self.clients], list(self.weights)
        if self.old_weight:
            parts, weights = [*parts, product_of(self.old)], [*weights, self.old_weight]
        if self.carried is not None:
            parts, weights = [*parts, self.carried], [*weights, 1.0]
        return weighted_sum(weights, parts)


class Reducer(ABC):
    """From clients' factors to global ones. Stateless; parameters are fields of frozen dataclasses.

    Laws: the order of clients does not matter beyond rounding (they come in id order); K equal clients give a product equal to
    theirs; weights times a constant change nothing, for they come with sum 1.
    """

    @property
    def mixes_ranks(self) -> bool:
        """Whether clients may differ in r and lora_alpha."""
        return False

    def residual_rank(self, ranks: Sequence[int], own: int) -> int:
        """The rank that what it misses can have at most: ranks are the clients', own the global adapter's."""
        return sum(ranks) + own

    def num_left_out(self, count: int) -> int | None:
        """How many of `count` clients' values it leaves out at each end; None where leaving out is not what it does."""
        return None

    def reduce_plain(
        self, tensors: Iterable[torch.Tensor], weights: Sequence[float], old: torch.Tensor, old_weight: float
    ) -> torch.Tensor:
        """Gives a tensor that is no factor (a bias, a saved module), float64: sum_k p_k x_k + old_weight x. tensors: the clients', in id order; old: the global one."""
        total = old.double() * old_weight
        for tensor, weight in zip(tensors, weights, strict=True):
            total.add_(tensor.double(), alpha=weight)
        return total

    @abstractmethod
    def reduce(self, cohort: ModuleCohort) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives b [d_out, r] and a [r, d_in], float64, that belong to old.scale."""


def mean_of(tensors: tuple[torch.Tensor, ...], weights: tuple[float, ...]) -> torch.Tensor:
    """sum_k p_k x_k in float64, in the order given; one tensor of weight 1 comes back as it is."""
    total = tensors[0].double() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.double(), alpha=weight)
    return total
