"""Clients' shares of the authors drawn from a Dirichlet distribution."""

import random
from dataclasses import dataclass

from fedunlearn.errors import UserError
from fedunlearn.partitions.base import Partitioner
from fedunlearn.partitions.shares import deal_by_shares


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Partitioner):
    """Shares ~ Dirichlet(alpha, ..., alpha), then whole authors, shuffled, in these shares; every client has at least one.

    alpha > 0: small ones leave most authors to few clients, large ones to all alike. Authors are TOFU's only classes, so that label skew
    (Hsu et al. 2019, arXiv:1909.06335) and quantity skew are one here.
    """

    alpha: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1e-3 <= self.alpha <= 1e6:
            raise UserError(f"partition.scheme.alpha={self.alpha} of Dirichlet must lie between 0.001 and 1e6")

    def deal(self, num_authors: int, num_clients: int) -> tuple[tuple[int, ...], ...]:
        """See Partitioner.deal."""
        draw = random.Random(self.seed)
        shares = [draw.gammavariate(self.alpha, 1.0) + 1e-300 for _ in range(num_clients)]
        return deal_by_shares(shares, num_authors, self.seed)
