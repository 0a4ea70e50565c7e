"""Who owns which rows of `full`, from fine-tuning to oracle."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from fedunlearn.files import canonical_json


@dataclass(frozen=True, kw_only=True)
class Partition:
    """clients: each client's row numbers in the split `full`, authors whole, in the order the client trains on them.

    scheme: the partitioner's class and parameters, for the record. data_hash: hash of `full`.
    """

    clients: tuple[tuple[int, ...], ...]
    rows_per_author: int
    data_hash: str
    scheme: Mapping[str, object]

    @property
    def num_clients(self) -> int:
        """How many clients own rows."""
        return len(self.clients)

    def owners(self, rows: Iterable[int]) -> frozenset[int]:
        """The clients that own any of these rows."""
        wanted = frozenset(rows)
        return frozenset(client for client, owned in enumerate(self.clients) if not wanted.isdisjoint(owned))

    @cached_property
    def hash(self) -> str:
        """sha256 of who owns what in which data; the scheme's name does not matter."""
        return hashlib.sha256(canonical_json([self.clients, self.rows_per_author, self.data_hash]).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnedRows:
    """One client's row numbers in `full`: those to forget and those to train on; without a request forget is empty."""

    client_id: int
    forget: tuple[int, ...]
    retain: tuple[int, ...]
    num_owned: int
