"""Contiguous authors: client k owns the k-th block."""

from dataclasses import dataclass

from fedunlearn.partitions.base import Partitioner


@dataclass(frozen=True, kw_only=True)
class ByAuthor(Partitioner):
    """Blocks of neighbouring authors whose sizes differ by at most one, larger blocks first.

    TOFU's forget splits are the last authors, so the last clients own them: 10 clients leave forget10 to client 9 alone.
    """

    def deal(self, num_authors: int, num_clients: int) -> tuple[tuple[int, ...], ...]:
        """See Partitioner.deal."""
        size, extra = divmod(num_authors, num_clients)
        starts = [k * size + min(k, extra) for k in range(num_clients + 1)]
        return tuple(tuple(range(starts[k], starts[k + 1])) for k in range(num_clients))
