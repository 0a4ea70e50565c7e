"""PGD: projected gradient ascent by the targets themselves (Halimi et al. 2022, arXiv:2207.05521)."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method
from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.protocols.base import Assignment, Stage, finetune_or_idle, idle, unlearn
from fedunlearn.records.rounds import ClientRows
from fedunlearn.server_methods.base import Beginning, ServerMethod, epochs_fault


@dataclass(frozen=True, kw_only=True)
class PGD(ServerMethod):
    """Begins at the others' mean, (sum p_k x_k - p_u x_u) / (1 - p_u) of the last fine-tuning round, as that round averaged; there the targets ascend
    CE on their forget rows, in one round, and after each step their factors' way is shortened until the product has moved by `radius` at most.
    The other rounds repair on retain rows, repair_epochs each.

    radius: Frobenius norm over all modules. The paper's, a third of the distance to random models, says nothing where B begins at 0.
    """

    radius: float = 1.0
    repair_epochs: float = 1.0

    def __post_init__(self) -> None:
        faults = epochs_fault("PGD", "repair_epochs", self.repair_epochs)
        if not 0 < self.radius < 1e15:
            faults.append(f"method.radius={self.radius} of PGD must be above 0")
        if faults:
            raise UserError(*faults)

    @property
    def local(self) -> Method:
        """Ascent alone."""
        return GradAscent()

    @property
    def beginning(self) -> Beginning:
        """The others' mean."""
        return "others"

    @property
    def reads_ledger(self) -> bool:
        """The others' last updates."""
        return True

    def owner_rounds(self, num_rounds: int) -> Sequence[int]:
        """Round 1."""
        return (1,)

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """Round 1: targets alone."""
        if stage.round > 1:
            return tuple(finetune_or_idle(rows, self.repair_epochs) for rows in cohort)
        return tuple(unlearn(rows, epochs) if rows.num_forget else idle(rows) for rows in cohort)

    def bound(self, stage: Stage) -> float:
        """In round 1."""
        return self.radius if stage.round == 1 else 0.0
