"""The best rank-r approximation of the exact product: FlexLoRA (Bai et al. 2024, arXiv:2402.11505)."""

from dataclasses import dataclass

import torch

from fedunlearn.aggregation.product import SMALLEST, truncated_svd
from fedunlearn.aggregation.reducers.base import ModuleCohort, Reducer


@dataclass(frozen=True)
class BestRank(Reducer):
    """B = U S / s, A = V^T of sum p_k s_k B_k A_k, the r largest singular values (Eckart and Young); a gauge balances them.

    Directions the product does not have keep a row of A orthogonal to the others and a zero column of B, so that they can still be
    learnt. A product of 0 leaves A as it was.
    """

    @property
    def mixes_ranks(self) -> bool:
        """Yes: a client of rank r_k is sent the first r_k."""
        return True

    def reduce(self, cohort: ModuleCohort) -> tuple[torch.Tensor, torch.Tensor]:
        """See Reducer.reduce."""
        old = cohort.old
        svd = truncated_svd(cohort.exact(), old.rank)
        if svd.is_zero:
            return torch.zeros_like(old.b, dtype=torch.float64), old.a.double()
        real = int((svd.s > SMALLEST * svd.s[0]).sum())
        b = torch.zeros_like(old.b, dtype=torch.float64)
        b[:, :real] = svd.u[:, :real] * (svd.s[:real] / old.scale)
        return b, completed(svd.vt[:real], old.a.double())


def completed(rows: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Gives as many orthonormal rows as `spare` has: first `rows`, which are orthonormal, then the main directions of what spare has beside them."""
    if len(rows) >= len(spare):
        return rows[: len(spare)]
    # a row of spare that `rows` spans would leave rounding for a direction, so the rest is sorted by its singular values first
    _, _, beside = torch.linalg.svd(spare - (spare @ rows.T) @ rows, full_matrices=False)
    basis, _ = torch.linalg.qr(torch.cat([rows, beside]).T)
    return torch.cat([rows, basis.T[len(rows) : len(spare)]])
