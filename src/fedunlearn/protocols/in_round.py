"""in_round: in each round the owners unlearn while the others fine-tune on their retain rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST
from fedunlearn.protocols.base import Assignment, Protocol, Stage, finetune_or_idle, unlearn
from fedunlearn.records.rounds import ClientRows


@dataclass(frozen=True, kw_only=True)
class InRound(Protocol):
    """finetune_epochs: epochs of those who do not unlearn; null = trainer.args.num_train_epochs, as the owners have."""

    finetune_epochs: float | None = 1.0

    def __post_init__(self) -> None:
        if self.finetune_epochs is not None and not 0 < self.finetune_epochs <= LARGEST:
            raise UserError(
                f"protocol.finetune_epochs={self.finetune_epochs} must be above 0, at most 1e6, or null for trainer.args.num_train_epochs"
            )

    @property
    def unlearns(self) -> bool:
        """A request is served."""
        return True

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """See Protocol.assign."""
        others = epochs if self.finetune_epochs is None else self.finetune_epochs
        return tuple(unlearn(rows, epochs) if rows.num_forget else finetune_or_idle(rows, others) for rows in cohort)
