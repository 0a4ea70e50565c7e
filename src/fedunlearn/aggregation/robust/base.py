"""The interface of a robust re-weighting: it sees the weights and the K x K Gram matrix of the product updates, nothing else."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

ROUNDED = 1e-6


@dataclass(frozen=True)
class Weighting:
    """What each client counts, in client-id order, and what is left for the old global adapter."""

    clients: tuple[float, ...]
    old: float = 0.0


class Robust(ABC):
    """Members are frozen dataclasses. Law: turning or rescaling a client's factors (B c, A / c) changes nothing, for only products are seen."""

    @property
    def min_updates(self) -> int:
        """Updates below which it has no meaning."""
        return 1

    @property
    def reads_gram(self) -> bool:
        """Whether the Gram matrix is asked for."""
        return True

    @abstractmethod
    def reweigh(self, weights: tuple[float, ...], gram: torch.Tensor) -> Weighting:
        """Gives new weights, finite; with what is left for the old adapter they sum to 1.

        weights: p_k, sum 1. gram: <U_i, U_j> of U_k = s_k B_k A_k - s B A, pooled over modules, [K, K] float64.
        """


def checked_weighting(given: object, count: int) -> Weighting:
    """Gives what a reweigh gave. Raises ValueError where it is no Weighting of `count` finite numbers that sum with what is left for the old to 1."""
    if not isinstance(given, Weighting):
        raise ValueError(f"reweigh gives a {type(given).__name__}; allowed: a Weighting")
    if len(given.clients) != count:
        raise ValueError(f"reweigh gives {len(given.clients)} weights for {count} updates; allowed: one each")
    made = Weighting(tuple(map(float, given.clients)), float(given.old))
    if not abs(sum((*made.clients, made.old)) - 1) <= ROUNDED:  # nan is not
        told = ", ".join(f"{weight:.3g}" for weight in made.clients)
        raise ValueError(
            f"reweigh gives the weights {told} and {made.old:.3g} for the old adapter; allowed: finite numbers of sum 1"
        )
    return made


def squared_distances(gram: torch.Tensor) -> torch.Tensor:
    """||U_i - U_j||^2 from inner products, [K, K] float64, never below 0."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
