"""Gauges by the SVD of the product: A orthonormal as in FedSVD (Lee et al. 2025, arXiv:2505.12805), or balanced, our form of FlexLoRA."""

import torch

from fedunlearn.aggregation.factors import Factors
from fedunlearn.aggregation.gauges.base import Gauge, Moment
from fedunlearn.aggregation.product import SMALLEST, LowRank, Svd, truncated_svd
from fedunlearn.aggregation.reducers.best_rank import completed


class Orthonormal(Gauge):
    """B = U S, A = V^T; a module whose product is 0 keeps its factors."""

    @property
    def keeps_place(self) -> bool:
        """No: singular vectors change order and sign as the product moves."""
        return False

    def refactor(
        self, b: torch.Tensor, a: torch.Tensor, old: Factors, moment: Moment
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Gauge.refactor."""
        svd = truncated_svd(LowRank(b, a), a.shape[0])
        if svd.is_zero:
            return b, a
        return _widened(svd.u * svd.s, a.shape[0]), completed(svd.vt, a)


class Balanced(Gauge):
    """B = U sqrt(S), A = sqrt(S) V^T, so that both factors have the same norm, direction by direction.

    Directions without weight keep a row of A of unit length and a zero column of B: they can still be learnt.
    """

    @property
    def keeps_place(self) -> bool:
        """No: singular vectors change order and sign as the product moves."""
        return False

    def refactor(
        self, b: torch.Tensor, a: torch.Tensor, old: Factors, moment: Moment
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Gauge.refactor."""
        svd = truncated_svd(LowRank(b, a), a.shape[0])
        return (b, a) if svd.is_zero else balanced(svd, a)


def balanced(svd: Svd, spare: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives B = U sqrt(S) [d_out, r] and A = sqrt(S) V^T [r, d_in], r the rows of `spare`, which fills directions without weight."""
    rows = completed(svd.vt, spare)
    alive = svd.s > SMALLEST * svd.s[0]
    root = torch.where(alive, svd.s.sqrt(), torch.zeros_like(svd.s))
    length = torch.ones(len(rows), dtype=rows.dtype)
    length[: len(root)] = torch.where(alive, root, torch.ones_like(root))
    return _widened(svd.u * root, len(rows)), rows * length[:, None]


def _widened(columns: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.nn.functional.pad(columns, (0, rank - columns.shape[1]))
