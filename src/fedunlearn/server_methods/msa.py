"""Federated MSA: a forget vector from an earlier adapter (model state arithmetic, Rezaei et al. 2026, arXiv:2506.20941)."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.errors import UserError
from fedunlearn.protocols.base import Assignment, Stage, finetune_or_idle, idle
from fedunlearn.records.rounds import ClientRows, Role
from fedunlearn.server_methods.base import Beginning, Change, Scene, ServerMethod, ServerStep, epochs_fault
from fedunlearn.server_methods.linear import Term, block_of


@dataclass(frozen=True, kw_only=True)
class MSA(ServerMethod):
    """Owners tune the adapter of `rewind` rounds before fine-tuning's end on their forget rows; the weighted mean of what that changes is the forget vector, and `scale`
    times it is subtracted from the adapter as it is, as an exact stack. Then num_rounds - 1 rounds of repair on retain rows,
    repair_epochs each.

    rewind: rounds back from the end of fine-tuning (all of them, and more: its beginning).
    """

    rewind: int = 1
    scale: float = 1.0
    repair_epochs: float = 1.0

    def __post_init__(self) -> None:
        faults = epochs_fault("MSA", "repair_epochs", self.repair_epochs)
        if self.rewind < 1:
            faults.append(f"method.rewind={self.rewind} of MSA must be at least 1 round")
        if not 0 < self.scale <= 1e3:
            faults.append(f"method.scale={self.scale} of MSA must be above 0, and at most 1000")
        if faults:
            raise UserError(*faults)

    @property
    def beginning(self) -> Beginning:
        """An earlier adapter; what round 1 gives is subtracted from the one as it is."""
        return "rewind"

    @property
    def rewind_rounds(self) -> int:
        """See the class."""
        return self.rewind

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """Round 1: owners alone, on forget rows."""
        if stage.round > 1:
            return tuple(finetune_or_idle(rows, self.repair_epochs) for rows in cohort)
        return tuple(
            Assignment(client_id=rows.client_id, role=Role.MEMORISE, epochs=epochs) if rows.num_forget else idle(rows)
            for rows in cohort
        )

    def owner_rounds(self, num_rounds: int) -> Sequence[int]:
        """Round 1."""
        return (1,)

    def step(self, stage: Stage) -> ServerStep:
        """Its own in round 1."""
        return ServerStep.OWN if stage.round == 1 else ServerStep.AVERAGE

    def change(self, scene: Scene) -> Change:
        """See the class."""
        terms = [
            term
            for u in scene.updates
            for term in (Term(-self.scale * u.weight, u.new), Term(self.scale * u.weight, u.old))
        ]
        return Change(block=block_of(terms, scene.modules), from_start=True)
