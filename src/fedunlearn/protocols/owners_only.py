"""owners_only: in each round the owners unlearn, and nobody else works."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.protocols.base import Assignment, Protocol, Stage, idle, unlearn
from fedunlearn.records.rounds import ClientRows


@dataclass(frozen=True, kw_only=True)
class OwnersOnly(Protocol):
    """The cheapest: what keeps the model is the owners' own retain term alone."""

    @property
    def unlearns(self) -> bool:
        """A request is served."""
        return True

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """See Protocol.assign."""
        return tuple(unlearn(rows, epochs) if rows.num_forget else idle(rows) for rows in cohort)
