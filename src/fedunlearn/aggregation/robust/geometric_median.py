"""The geometric median of product updates (RFA: Pillutla et al. 2019, arXiv:1912.13445), by Weiszfeld's iteration on the Gram matrix."""

from dataclasses import dataclass

import torch

from fedunlearn.aggregation.robust.base import Robust, Weighting
from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Robust):
    """The point x = sum w_k U_k with the least sum p_k ||x - U_k||. It always lies in the updates' span, so K weights say all of it.

    max_iterations: of Weiszfeld; it ends earlier where x moves by less than `tolerance` of the median norm (of updates that are not
    zero). Distances below a millionth of that norm count as that: the smoothing of RFA. The median, for one attacker sets the largest.
    """

    max_iterations: int = 1000
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        if not 1 <= self.max_iterations <= LARGEST or not 0 < self.tolerance < 1:
            raise UserError(
                f"robust.max_iterations={self.max_iterations} must lie between 1 and 1e6 and robust.tolerance={self.tolerance} between 0 and 1"
            )

    def reweigh(self, weights: tuple[float, ...], gram: torch.Tensor) -> Weighting:
        """See Robust.reweigh."""
        given = torch.tensor(weights, dtype=torch.float64)
        norms = gram.diagonal().clamp_min(0).sqrt()
        if not bool(norms.any()):
            return Weighting(weights)
        size = float(norms[norms > 0].median())
        now = given / given.sum()
        for _ in range(self.max_iterations):
            squared = now @ gram @ now - 2 * (gram @ now) + gram.diagonal()
            pulls = given / squared.clamp_min((1e-6 * size) ** 2).sqrt()
            after = pulls / pulls.sum()
            moved = float((after - now) @ gram @ (after - now))
            now = after
            if moved < (self.tolerance * size) ** 2:
                break
        return Weighting(tuple(now.tolist()))
