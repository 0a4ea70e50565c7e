"""Authors dealt in turn, as cards are: author i to client i mod K."""

from dataclasses import dataclass

from fedunlearn.partitions.base import Partitioner


@dataclass(frozen=True, kw_only=True)
class RoundRobin(Partitioner):
    """Author i belongs to client i mod num_clients, so that a forget split has several owners."""

    def deal(self, num_authors: int, num_clients: int) -> tuple[tuple[int, ...], ...]:
        """See Partitioner.deal."""
        return tuple(tuple(range(k, num_authors, num_clients)) for k in range(num_clients))
