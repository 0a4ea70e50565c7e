"""A request to forget, as row numbers of `full`."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from fedunlearn.files import canonical_json


@dataclass(frozen=True)
class ReleasedRow:
    """A row of a request that its owner agreed to show to other clients. number: in `full`."""

    number: int
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """rows: to be forgotten by this run (in the oracle: left out of it). before: forgotten by earlier requests. Both sorted, none in both.

    gone: clients that take no part any more, by this request or an earlier one.
    """

    rows: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    gone: tuple[int, ...] = ()

    @cached_property
    def all(self) -> frozenset[int]:
        """Rows that must not be trained on."""
        return frozenset((*self.rows, *self.before))

    @cached_property
    def hash(self) -> str:
        """sha256 of it."""
        return hashlib.sha256(canonical_json([self.rows, self.before, self.gone]).encode()).hexdigest()
