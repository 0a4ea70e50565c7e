"""Authors shuffled by a seed, then dealt in turn."""

import random
from dataclasses import dataclass

from fedunlearn.partitions.base import Partitioner


@dataclass(frozen=True, kw_only=True)
class Iid(Partitioner):
    """Independent of the order of authors: a seeded shuffle, then author i of the shuffled list to client i mod num_clients."""

    seed: int = 0

    def deal(self, num_authors: int, num_clients: int) -> tuple[tuple[int, ...], ...]:
        """See Partitioner.deal."""
        authors = list(range(num_authors))
        random.Random(self.seed).shuffle(authors)
        return tuple(tuple(sorted(authors[k::num_clients])) for k in range(num_clients))
