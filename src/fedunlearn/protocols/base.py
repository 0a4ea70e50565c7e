"""The interface of a protocol: a pure function from a round and a cohort to roles."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.records.rounds import WHOLE, ClientRows, Role, Share


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a run stands: round `round` (from 1) of num_rounds."""

    round: int
    num_rounds: int


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A client's role and how many epochs it lasts (over forget rows for unlearn, over retain rows for finetune; 0 for idle). share: of several rounds'."""

    client_id: int
    role: Role
    epochs: float
    share: Share = WHOLE


IDLE_EPOCHS = 0.0


class Protocol(ABC):
    """Who does what. Members are frozen dataclasses; they keep no state between rounds.

    Laws: one assignment a client of the cohort, in its order; `unlearn` only to clients with forget rows (or, where `releases`, with
    those that their owners released), `finetune` only to clients with retain rows; the same arguments give the same roles; an owner that is drawn
    each round makes the steps of num_rounds rounds of `epochs` in all, whatever the rounds it does so in, so that protocols compare.
    """

    @property
    @abstractmethod
    def unlearns(self) -> bool:
        """Whether this protocol serves a request to forget (else fine-tuning)."""

    @property
    def releases(self) -> bool:
        """Whether the request's rows are sent to clients that do not own them."""
        return False

    def faults(self, num_rounds: int) -> tuple[str, ...]:
        """A sentence for every parameter that does not fit trainer.federated.num_rounds."""
        return ()

    @abstractmethod
    def assign(self, stage: Stage, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """Gives the roles of a round. epochs: trainer.args.num_train_epochs."""


def unlearn(rows: ClientRows, epochs: float, share: Share = WHOLE) -> Assignment:
    """The role of a client that unlearns."""
    return Assignment(client_id=rows.client_id, role=Role.UNLEARN, epochs=epochs, share=share)


def finetune_or_idle(rows: ClientRows, epochs: float) -> Assignment:
    """The role of a client that has nothing to unlearn now: train on its retain rows, or stand idle where it has none."""
    if rows.num_retain:
        return Assignment(client_id=rows.client_id, role=Role.FINETUNE, epochs=epochs)
    return idle(rows)


def idle(rows: ClientRows) -> Assignment:
    """The role of a client that sits the round out."""
    return Assignment(client_id=rows.client_id, role=Role.IDLE, epochs=IDLE_EPOCHS)
