"""Fine-tuning, and the retrain oracle: everyone trains on what it has."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.protocols.base import Assignment, Protocol, Stage, finetune_or_idle
from fedunlearn.records.rounds import ClientRows


@dataclass(frozen=True, kw_only=True)
class Finetune(Protocol):
    """Every client of the cohort fine-tunes in every round."""

    @property
    def unlearns(self) -> bool:
        """No request is served."""
        return False

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """See Protocol.assign."""
        return tuple(finetune_or_idle(rows, epochs) for rows in cohort)
