"""Who carries out a client's steps: one process, or one of several that share every micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from fedunlearn.training.steps import MicroBatch


@dataclass(frozen=True)
class Dealt:
    """What this process makes of a micro-batch. of_rows, of_retain: 0 where the rows only stand in for an empty share and count for nothing, else 1."""

    part: MicroBatch
    of_rows: int = 1
    of_retain: int = 1


class Crew(Protocol):
    """The processes together, as one of them sees it.

    Laws: over all of them the rows dealt with weight 1 are the micro-batch's, each once; after add_up every one of them has the same gradients and numbers.
    """

    def deal(self, part: MicroBatch) -> Dealt:
        """Gives this process's share, with at least one row wherever the micro-batch has some: all run the same forwards."""

    def add_up(self, model: nn.Module, numbers: Sequence[float]) -> Sequence[float]:
        """Sums the gradients of an optimiser step, in place, and the numbers, over the processes."""


class Alone:
    """One process: everything is its own."""

    def deal(self, part: MicroBatch) -> Dealt:
        """See Crew."""
        return Dealt(part)

    def add_up(self, model: nn.Module, numbers: Sequence[float]) -> Sequence[float]:
        """See Crew."""
        return numbers


ALONE = Alone()
