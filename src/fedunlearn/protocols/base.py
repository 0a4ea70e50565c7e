"""The interface of a protocol: a pure function from a round and a cohort to roles."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from fedunlearn.records.rounds import ClientRows, Role


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A client's role and how many epochs it lasts (over forget rows for unlearn, over retain rows for finetune; 0 for idle)."""

    client_id: int
    role: Role
    epochs: float


IDLE_EPOCHS = 0.0


class Protocol(ABC):
    """Who does what. Members are frozen dataclasses; they keep no state between rounds.

    Laws: one assignment a client of the cohort, in its order; `unlearn` only to clients with forget rows, `finetune` only to
    clients with retain rows; the same arguments give the same roles.
    """

    @property
    @abstractmethod
    def unlearns(self) -> bool:
        """Whether this protocol serves a request to forget (else fine-tuning)."""

    def faults(self, num_rounds: int) -> tuple[str, ...]:
        """A sentence for every parameter that does not fit trainer.federated.num_rounds."""
        return ()

    @abstractmethod
    def assign(self, round: int, cohort: Sequence[ClientRows], epochs: float) -> tuple[Assignment, ...]:
        """Gives the roles of round `round` (from 1). epochs: trainer.args.num_train_epochs."""


def finetune_or_idle(rows: ClientRows, epochs: float) -> Assignment:
    """The role of a client that has nothing to unlearn now: train on its retain rows, or stand idle where it has none."""
    if rows.num_retain:
        return Assignment(client_id=rows.client_id, role=Role.FINETUNE, epochs=epochs)
    return idle(rows)


def idle(rows: ClientRows) -> Assignment:
    """The role of a client that sits the round out."""
    return Assignment(client_id=rows.client_id, role=Role.IDLE, epochs=IDLE_EPOCHS)
