"""The interface of a robust re-weighting: it sees the weights and the K x K Gram matrix of the product updates, nothing else."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


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
        """Gives new weights. weights: p_k, sum 1. gram: <U_i, U_j> of U_k = s_k B_k A_k - s B A, pooled over modules, [K, K] float64."""


def squared_distances(gram: torch.Tensor) -> torch.Tensor:
    """||U_i - U_j||^2 from inner products, [K, K] float64, never below 0."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
