"""What a round is made of: the plan that goes out, the update that comes back, the verdict, and one line of history."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fedunlearn.records.adapter import Tensors


class Role(StrEnum):
    """What a client does in a round: train on its (retain) rows, unlearn its forget rows, or nothing."""

    FINETUNE = "finetune"
    UNLEARN = "unlearn"
    IDLE = "idle"


class Trained(StrEnum):
    """Which LoRA factors a client trains in a round, sends back, and the server steps over."""

    BOTH = "both"
    A = "a"
    B = "b"

    def covers(self, name: str) -> bool:
        """Whether a tensor of the adapter is among them."""
        return self is Trained.BOTH or f".lora_{self.value.upper()}." in name


@dataclass(frozen=True, kw_only=True)
class ClientRows:
    """What a client declares at the roll call: rows it owns, and how many of them are to be forgotten or kept.

    Fine-tuning knows no request: there num_forget is 0 and num_retain the rows it trains on.
    """

    client_id: int
    num_owned: int
    num_forget: int
    num_retain: int


@dataclass(frozen=True, kw_only=True)
class ClientTask:
    """One client's part of a round. epochs counts passes over its forget rows (unlearn) or its retain rows (finetune)."""

    client_id: int
    role: Role
    epochs: float
    lr_scale: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """Who does what in round `round` (from 1); clients in client-id order."""

    round: int
    tasks: tuple[ClientTask, ...]


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """What a client sends back. num_examples: rows owned, as declared; num_trained: rows trained on this round.

    loss: mean of the training loss over the optimiser steps; loss_trace: its mean over every `logging_steps` steps.
    """

    client_id: int
    round: int
    run_id: str
    tensors: Tensors
    num_examples: int
    num_trained: int
    num_steps: int
    num_tokens: int
    seconds: float
    loss: float
    loss_trace: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ClientOutcome:
    """One client's line in a round's history. reason: empty where the update counted, else the gate's code."""

    client_id: int
    role: Role
    weight: float
    reason: str = ""
    detail: str = ""
    num_examples: int = 0
    num_trained: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    loss_trace: tuple[float, ...] = ()
    bytes_down: int = 0
    bytes_down_reference: int = 0
    bytes_up: int = 0


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """One line of history.jsonl. attempt counts from 1; adapter_hash names the global adapter after the round."""

    round: int
    attempt: int
    adapter_hash: str
    seconds: float
    clients: tuple[ClientOutcome, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
