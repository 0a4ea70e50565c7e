"""FedRot (arXiv:2602.23638): clients' factors are turned towards the global ones before they are averaged."""

from dataclasses import dataclass, replace

import torch

from fedunlearn.aggregation.factors import Factors
from fedunlearn.aggregation.gauges.base import Gauge, Moment
from fedunlearn.aggregation.reducers.base import ModuleCohort


@dataclass(frozen=True)
class Procrustes(Gauge):
    """B_k R and R^T A_k, R the rotation that brings A_k (in even rounds) or B_k (in odd ones) nearest to the global factor.

    A comes first, in round 2; round 1 has no reference worth the name. softness lam: the nearest rotation of (1 - lam) I + lam R is
    taken; 0 turns nothing, 1 all the way.
    """

    softness: float

    def align(self, cohort: ModuleCohort, moment: Moment) -> ModuleCohort:
        """See Gauge.align."""
        if moment.round == 1:
            return cohort
        by_a = moment.round % 2 == 0
        return replace(cohort, clients=tuple(self._turned(client, cohort.old, by_a) for client in cohort.clients))

    def _turned(self, client: Factors, old: Factors, by_a: bool) -> Factors:
        between = client.a @ old.a.T if by_a else client.b.T @ old.b
        turn = nearest_rotation(between)
        if self.softness < 1:
            turn = nearest_rotation((1 - self.softness) * torch.eye(len(turn), dtype=turn.dtype) + self.softness * turn)
        return Factors(client.b @ turn, turn.T @ client.a, client.scale)


def nearest_rotation(matrix: torch.Tensor) -> torch.Tensor:
    """Gives U V^T of the SVD of a square matrix, the last column of U flipped where the determinant is negative: a rotation, never a reflection."""
    u, _, vt = torch.linalg.svd(matrix)
    if torch.linalg.det(u @ vt) < 0:
        u[:, -1] = -u[:, -1]
    turn: torch.Tensor = u @ vt
    return turn
