"""The algebra of s B A without ever forming it: sums, inner products, norms, and the truncated SVD by its QR-core.

Everything is float64: an update that is a thousandth of the adapter loses 3 % of its norm in float32, one of a
ten-thousandth all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedunlearn.aggregation.factors import Factors

SMALLEST = 1e-13


@dataclass(frozen=True, eq=False)
class LowRank:
    """left @ right: left [d_out, q], right [q, d_in], float64."""

    left: torch.Tensor
    right: torch.Tensor

    @property
    def rank(self) -> int:
        """q: the rank it can have at most."""
        return int(self.right.shape[0])

    def dense(self) -> torch.Tensor:
        """Left @ right, [d_out, d_in]: for small matrices and tests."""
        return self.left @ self.right


@dataclass(frozen=True, eq=False)
class Svd:
    """u [d_out, k], s [k] descending, vt [k, d_in]; float64. Signs are fixed: the largest entry of each column of u is positive."""

    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor

    @property
    def is_zero(self) -> bool:
        """Whether the product has no direction at all."""
        return not len(self.s) or float(self.s[0]) == 0


def product_of(factors: Factors) -> LowRank:
    """Scale * b @ a."""
    exact = factors.double
    return LowRank(exact.b * exact.scale, exact.a)


def weighted_sum(weights: Sequence[float], parts: Sequence[LowRank]) -> LowRank:
    """sum_k p_k left_k @ right_k as one stack, of rank sum_k q_k."""
    return LowRank(
        torch.cat([part.left * weight for weight, part in zip(weights, parts, strict=True)], dim=1),
        torch.cat([part.right for part in parts], dim=0),
    )


def update_of(client: Factors, old: Factors) -> LowRank:
    """U_k = s_k B_k A_k - s B A, written so that small updates keep their digits.

    Where ranks agree: [s_k B_k - s B | s B][A_k ; A_k - A], whose terms are as small as the update; else [s_k B_k | -s B][A_k ; A].
    """
    new, ref = client.double, old.double
    if new.rank != ref.rank:
        return LowRank(torch.cat([new.b * new.scale, ref.b * -ref.scale], 1), torch.cat([new.a, ref.a], 0))
    scaled = ref.b * ref.scale
    return LowRank(torch.cat([new.b * new.scale - scaled, scaled], 1), torch.cat([new.a, new.a - ref.a], 0))


def inner_products(parts: Sequence[LowRank]) -> torch.Tensor:
    """Gives <P_i, P_j> = tr((L_i^T L_j)(R_j R_i^T)) for all pairs, [K, K] float64, without a d_out x d_in matrix."""
    left = torch.cat([part.left for part in parts], dim=1)
    right = torch.cat([part.right for part in parts], dim=0)
    both = (left.T @ left) * (right @ right.T)
    sizes = [part.rank for part in parts]
    rows = torch.stack([block.sum(0) for block in torch.split(both, sizes, dim=0)])
    return torch.stack([block.sum(1) for block in torch.split(rows, sizes, dim=1)], dim=1)


def squared_norm(part: LowRank) -> float:
    """Squared Frobenius norm. A difference that cancels leaves about 1e-16 of the squared norms of its terms; never below 0."""
    return max(float(((part.left.T @ part.left) * (part.right @ part.right.T)).sum()), 0.0)


def truncated_svd(part: LowRank, rank: int) -> Svd:
    """Gives the first `rank` singular triplets, or as many as left and right can have.

    The QR-core: left = Q_L R_L, right^T = Q_R R_R, then the SVD of R_L R_R^T [q, q]. Where q reaches the smaller side the
    dense matrix is as cheap, and is taken.
    """
    if part.rank >= min(part.left.shape[0], part.right.shape[1]):
        u, s, vt = torch.linalg.svd(part.dense(), full_matrices=False)
    else:
        q_left, r_left = torch.linalg.qr(part.left)
        q_right, r_right = torch.linalg.qr(part.right.T)
        u, s, vt = torch.linalg.svd(r_left @ r_right.T)
        u, vt = q_left @ u, vt @ q_right.T
    rank = min(rank, part.rank)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return Svd(u * sign, s, vt * sign.T)


def compressed(part: LowRank, rank: int | None = None, floor: float = 0.0) -> LowRank:
    """Gives the same matrix at the least rank that holds it (to 1e-13 of its largest singular value), at most `rank`.

    floor: singular values up to it count as 0. A difference wants one: where its terms cancel, what is left is rounding of full rank.
    """
    svd = truncated_svd(part, part.rank if rank is None else rank)
    keep = int((svd.s > max(SMALLEST * float(svd.s[0]), floor)).sum()) if len(svd.s) else 0
    root = svd.s[:keep].sqrt()
    return LowRank(svd.u[:, :keep] * root, root[:, None] * svd.vt[:keep])
