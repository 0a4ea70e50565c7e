"""Negation: what the targets added is taken away again."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.errors import UserError
from fedunlearn.protocols.base import Assignment, Stage, finetune_or_idle, idle
from fedunlearn.records.rounds import ClientRows
from fedunlearn.server_methods.base import Change, Origin, Scene, ServerMethod, ServerStep, epochs_fault
from fedunlearn.server_methods.linear import Term, block_of


@dataclass(frozen=True, kw_only=True)
class Negation(ServerMethod):
    """Subtracts `scale` times sum_t p_k U_k, the targets' contributions of all fine-tuning rounds, as an exact stack; then num_rounds - 1 rounds of
    repair on retain rows, repair_epochs each.

    Defined where the global adapter is the start plus the sum of all p_k U_k: with FedAvg or FedProx, and an aggregation that loses nothing of
    the product: FFA-LoRA, RoLoRA, FedSVD, FLoRA, FedEx-LoRA. A stack, not rank r: cut to r what is subtracted would be off by a tenth.
    """

    scale: float = 1.0
    repair_epochs: float = 1.0

    def __post_init__(self) -> None:
        faults = epochs_fault("Negation", "repair_epochs", self.repair_epochs)
        if not 0 < self.scale <= 1e3:
            faults.append(f"method.scale={self.scale} of Negation must be above 0, and at most 1000")
        if faults:
            raise UserError(*faults)

    @property
    def reads_ledger(self) -> bool:
        """The targets' updates."""
        return True

    @property
    def reads_contributions(self) -> bool:
        """Yes."""
        return True

    def check_origin(self, origin: Origin) -> str:
        """See ServerMethod.check_origin."""
        if origin.strategy not in ("FedAvg", "FedProx"):
            return f"its strategy {origin.strategy} moved the adapter by other steps than the mean: fine-tune with strategy=fedavg or fedprox"
        if not origin.exact:
            return (
                f"aggregation.reducer={origin.reducer} with residual={origin.residual} and sidecar_rank={origin.sidecar_rank} lost something of each round's "
                "product, so the adapter is no sum of the clients' updates: fine-tune with aggregation=ffa, rolora, fedsvd, flora or fedex"
            )
        return ""

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """Nobody works in round 1."""
        if stage.round == 1:
            return tuple(idle(rows) for rows in cohort)
        return tuple(finetune_or_idle(rows, self.repair_epochs) for rows in cohort)

    def step(self, stage: Stage) -> ServerStep:
        """Its own in round 1."""
        return ServerStep.OWN if stage.round == 1 else ServerStep.AVERAGE

    def change(self, scene: Scene) -> Change:
        """See the class."""
        terms = [
            term
            for c in scene.contributions
            for term in (Term(-self.scale * c.weight, c.new), Term(self.scale * c.weight, c.old))
        ]
        return Change(block=block_of(terms, scene.modules))
