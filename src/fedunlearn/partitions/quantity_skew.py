"""Clients of unlike size by a power law."""

from dataclasses import dataclass

from fedunlearn.errors import UserError
from fedunlearn.partitions.base import Partitioner
from fedunlearn.partitions.shares import deal_by_shares


@dataclass(frozen=True, kw_only=True)
class QuantitySkew(Partitioner):
    """Client k has a share of the authors proportional to (k + 1)^-exponent, at least one; which authors, a seeded shuffle says.

    exponent >= 0: 0 is iid, 1 Zipf's law.
    """

    exponent: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.exponent <= 10:
            raise UserError(
                f"partition.scheme.exponent={self.exponent} of QuantitySkew must lie between 0 (all alike) and 10"
            )

    def deal(self, num_authors: int, num_clients: int) -> tuple[tuple[int, ...], ...]:
        """See Partitioner.deal."""
        return deal_by_shares([(k + 1) ** -self.exponent for k in range(num_clients)], num_authors, self.seed)
