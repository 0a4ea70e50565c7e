"""What a federation owns, forgets and trains on, whichever benchmark it is from."""

from collections.abc import Sequence
from typing import Protocol

from fedunlearn.data.chat import ChatFormat, EncodedRow


class Benchmark(Protocol):
    """Numbered rows, all of them together called `full`; a forget split is some of them, its retain split the others.

    A row is what is owned and asked to be forgotten; an example (EncodedRow) is what a step trains on. Laws: `encode` is a function of the numbers and the chat format, gives
    at least one example for at least one row, and no example holds tokens of a forget row and of another.
    """

    @property
    def key(self) -> str:
        """What the config calls it, for messages."""

    @property
    def path(self) -> str:
        """Folder or hub id, for messages."""

    @property
    def rows_per_author(self) -> int:
        """How many consecutive rows belong together: they are never owned by two clients."""

    @property
    def unit(self) -> str:
        """What these rows are together, for messages: `author`."""

    @property
    def num_rows(self) -> int:
        """Rows of `full`."""

    def hash(self, split: str) -> str:
        """Gives the sha256 of the texts of a split, in order; `full` is one."""

    def check_splits(self, forget_split: str, retain_split: str) -> None:
        """Raises UserError unless the two are the two parts of `full`."""

    def forget_rows(self, forget_split: str) -> tuple[int, ...]:
        """Gives the numbers in `full` of a forget split's rows, ascending."""

    def encode(self, chat: ChatFormat, numbers: Sequence[int]) -> tuple[EncodedRow, ...]:
        """Gives rows of `full` as examples, in order. Raises UserError naming the first row that does not fit."""
