"""The interface of a partitioner: authors to clients, whole authors only."""

from abc import ABC, abstractmethod


class Partitioner(ABC):
    """Deals authors to clients. Members are frozen dataclasses; random numbers come from their own seed.

    Laws: every author goes to exactly one client; every client gets at least one; the same arguments give the same deal.
    """

    @abstractmethod
    def deal(self, num_authors: int, num_clients: int) -> tuple[tuple[int, ...], ...]:
        """Gives each client's author numbers (0 .. num_authors - 1), in the order the client trains on them.

        num_clients <= num_authors is the caller's promise.
        """
