"""The interface of a server-side method, and what it is shown of a round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from fedunlearn.aggregation.factors import Module
from fedunlearn.limits import LARGEST
from fedunlearn.methods.base import Method, Unlearner
from fedunlearn.protocols.base import Assignment, Stage, finetune_or_idle
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientRows
from fedunlearn.server_methods.linear import ReadProduct

Beginning = Literal["present", "origin", "rollback", "rewind", "others", "fresh"]
"""What a run's first round begins with: the adapter as it is; the one that fine-tuning began with; fine-tuning's state before the targets' first
contribution; an earlier adapter of fine-tuning; the last round's mean without the targets; fresh factors over the adapter as it is, which is frozen."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How fine-tuning averaged. strategy: its class name; masked: one factor at a time; the others as aggregation.* says."""

    strategy: str
    reducer: str
    residual: str
    masked: bool
    sidecar_rank: int | None = None

    @property
    def exact(self) -> bool:
        """Whether each round's mean was the exact product: one factor's mean, or all that the factors miss in a side-car of any rank."""
        if self.residual == "sidecar":
            return self.sidecar_rank is None
        return self.masked and self.reducer == "factors"


class ServerStep(StrEnum):
    """What the server does with a round's updates: average as ever, or what the method says."""

    AVERAGE = "average"
    OWN = "own"


@dataclass(frozen=True, eq=False, kw_only=True)
class Contribution:
    """What one client did to the adapter in one round, as products. new: what it sent; old: what it was sent. weight: p_k, sum 1 over those who count."""

    client_id: int
    weight: float
    new: ReadProduct
    old: ReadProduct


@dataclass(frozen=True, eq=False, kw_only=True)
class Scene:
    """What a method sees when a round's updates are in.

    stage: the round. modules: of the adapter. now: the global adapter, side-car included; start: as it was when unlearning began. updates: this
    round's; held: those that the round before asked to hold. contributions: the targets' in fine-tuning, round after round (only where
    `reads_contributions`). old_norms: (client) -> ||U_old|| by module, of the fine-tuning round that this one replays.
    """

    stage: Stage
    modules: tuple[Module, ...]
    now: ReadProduct
    start: ReadProduct
    updates: tuple[Contribution, ...]
    held: tuple[Contribution, ...] = ()
    contributions: tuple[Contribution, ...] = ()
    old_norms: Mapping[int, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Change:
    """What becomes of the adapter. block: goes into the side-car, factors stay (from_start: those that unlearning began with come back). weights: by module name what each update counts for (client -> w); the
    exact sum, with 1 - sum of them for the old adapter, is brought to rank r. hold: keep the updates for the next round, change nothing.

    figures: for the history.
    """

    block: Tensors = field(default_factory=dict)
    from_start: bool = False
    weights: Mapping[str, Mapping[int, float]] | None = None
    hold: bool = False
    figures: Mapping[str, float] = field(default_factory=dict)


def epochs_fault(name: str, key: str, value: float) -> list[str]:
    """Gives the fault of a number of epochs that is not above 0, or absurd; empty where it is neither."""
    return [] if 0 < value <= LARGEST else [f"method.{key}={value} of {name} must be above 0, at most {LARGEST:g}"]


class ServerMethod(Unlearner):
    """A method of the server's: where its rounds begin, who works in them, and what is made of what comes back.

    Members are frozen dataclasses. The targets are the owners of the request's rows. Everything a member does not override is plain
    fine-tuning on retain rows, averaged as the config says.
    """

    @property
    def local(self) -> Method | None:
        """The loss that owners minimise where they unlearn; None where none does."""
        return None

    @property
    def beginning(self) -> Beginning:
        """What the first round begins with."""
        return "present"

    @property
    def rewind_rounds(self) -> int:
        """How many rounds before the end of fine-tuning `rewind` goes back to."""
        return 1

    @property
    def replays(self) -> bool:
        """Whether its rounds are those of the fine-tuning run over again, whose settings it must then have."""
        return self.beginning in ("origin", "rollback")

    @property
    def reads_ledger(self) -> bool:
        """Whether it needs the ledger of the fine-tuning run."""
        return False

    @property
    def reads_contributions(self) -> bool:
        """Whether it needs the targets' own updates from that ledger."""
        return False

    def check_origin(self, origin: Origin) -> str:
        """Says why the method is not defined after fine-tuning that averaged so; empty where it is."""
        return ""

    def faults(self, num_rounds: int) -> tuple[str, ...]:
        """A sentence for every parameter that does not fit trainer.federated.num_rounds."""
        return ()

    def rounds(self, num_rounds: int) -> int:
        """How many rounds a run has. num_rounds: trainer.federated.num_rounds."""
        return num_rounds

    def origin_round(self, round: int) -> int:
        """The fine-tuning round that seeds, draws and learning rates of this one are."""
        return round

    def as_they_were(self, stage: Stage) -> bool:
        """Whether this round takes the remaining clients' old updates from the ledger, and nobody works."""
        return False

    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """Gives the roles of a round, as Protocol.assign does."""
        return tuple(finetune_or_idle(rows, epochs) for rows in cohort)

    def owner_rounds(self, num_rounds: int) -> Sequence[int]:
        """The rounds in which an owner must work on the request's rows, or the method does nothing."""
        return ()

    def draws_all(self, stage: Stage) -> bool:
        """Whether this round wants every client that is there, not a draw."""
        return False

    def bound(self, stage: Stage) -> float:
        """How far from where the round begins an owner's product may go, as a Frobenius norm; 0: no bound."""
        return 0.0

    def step(self, stage: Stage) -> ServerStep:
        """What the server does with this round's updates."""
        return ServerStep.AVERAGE

    @property
    def never_averages(self) -> bool:
        """Whether every step is its own, however many rounds there are: strategy, robust weights and reducer would have no effect."""
        return False

    def change(self, scene: Scene) -> Change:
        """Gives what becomes of the adapter in a round whose step is its own."""
        raise NotImplementedError(type(self).__name__)
