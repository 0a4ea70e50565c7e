"""target_then_repair: the owners unlearn first, alone; then everyone repairs on retain rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST
from fedunlearn.protocols.base import Assignment, Protocol, Stage, finetune_or_idle, idle, unlearn
from fedunlearn.records.rounds import ClientRows, Share


@dataclass(frozen=True, kw_only=True)
class TargetThenRepair(Protocol):
    """unlearn_rounds: rounds in which only owners work, at most num_rounds; the rest of num_rounds repairs. In them an owner makes all the steps it
    would have made with in_round: those of num_rounds times trainer.args.num_train_epochs, in parts as equal as can be.

    repair_epochs: epochs over retain rows in a repair round; null = trainer.args.num_train_epochs.
    """

    unlearn_rounds: int = 1
    repair_epochs: float | None = 1.0

    def __post_init__(self) -> None:
        if self.unlearn_rounds < 1:
            raise UserError(f"protocol.unlearn_rounds={self.unlearn_rounds} must be at least 1")
        if self.repair_epochs is not None and not 0 < self.repair_epochs <= LARGEST:
            raise UserError(
                f"protocol.repair_epochs={self.repair_epochs} must be above 0, at most 1e6, or null for trainer.args.num_train_epochs"
            )

    @property
    def unlearns(self) -> bool:
        """A request is served."""
        return True

    def faults(self, num_rounds: int) -> tuple[str, ...]:
        """See Protocol.faults."""
        at = f"protocol.unlearn_rounds={self.unlearn_rounds} beside trainer.federated.num_rounds={num_rounds}"
        if self.unlearn_rounds > num_rounds:
            return (f"{at}: there are not so many rounds; lower it, or raise num_rounds",)
        if self.unlearn_rounds == num_rounds and self.repair_epochs is not None:
            return (
                f"{at}: no round is left for protocol.repair_epochs={self.repair_epochs} to act in; leave that null, lower unlearn_rounds, "
                "or raise num_rounds",
            )
        return ()

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """See Protocol.assign."""
        if stage.round <= self.unlearn_rounds:
            share = Share(rounds=stage.num_rounds, part=stage.round, parts=min(self.unlearn_rounds, stage.num_rounds))
            return tuple(unlearn(rows, epochs, share) if rows.num_forget else idle(rows) for rows in cohort)
        repair = epochs if self.repair_epochs is None else self.repair_epochs
        return tuple(finetune_or_idle(rows, repair) for rows in cohort)
