"""What a round is made of: the plan that goes out, the update that comes back, the verdict, and one line of history."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fedunlearn.records.adapter import A, B, Tensors


class Role(StrEnum):
    """What a client does in a round: train on its (retain) rows, unlearn its forget rows, train on these (for a forget vector), or nothing."""

    FINETUNE = "finetune"
    UNLEARN = "unlearn"
    MEMORISE = "memorise"
    IDLE = "idle"

    @property
    def on_forget_rows(self) -> bool:
        """Whether it works on the rows of a request."""
        return self in (Role.UNLEARN, Role.MEMORISE)


class Trained(StrEnum):
    """Which LoRA factors a client trains in a round, sends back, and the server steps over; plain tensors are always among them."""

    BOTH = "both"
    A = "a"
    B = "b"

    def covers(self, name: str) -> bool:
        """Whether a tensor of the adapter is among them."""
        rests = {Trained.A: B, Trained.B: A}.get(self)
        return rests is None or not name.endswith(rests)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientRows:
    """What a client declares at the roll call: rows it owns, and how many of them are to be forgotten or kept.

    Fine-tuning knows no request: there num_forget is 0 and num_retain the rows it trains on.
    """

    client_id: int
    num_owned: int
    num_forget: int
    num_retain: int

    @property
    def some(self) -> bool:
        """Whether it has anything to work on."""
        return self.num_forget + self.num_retain > 0


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a round makes of the steps of several: part `part` (from 1) of `parts` as equal as can be, of the steps of `rounds` rounds together."""

    rounds: int = 1
    part: int = 1
    parts: int = 1

    def of(self, steps: int) -> int:
        """Gives this round's steps. steps: those of a round that stands for itself; over all parts the sum is rounds x steps."""
        whole = self.rounds * steps
        return whole * self.part // self.parts - whole * (self.part - 1) // self.parts


WHOLE = Share()
"""A round that stands for itself."""


@dataclass(frozen=True, kw_only=True)
class ClientTask:
    """One client's part of a round. epochs counts passes over its forget rows (unlearn) or its retain rows (finetune); share: see Share.

    mu: FedProx's weight (0: no term). trained: the factors that get gradients and come back. memory: what the method remembers of this client.
    radius: Frobenius norm that the product may move by at most, after every step (0: no bound).
    """

    client_id: int
    role: Role
    epochs: float
    lr_scale: float
    seed: int
    share: Share = WHOLE
    mu: float = 0.0
    trained: Trained = Trained.BOTH
    memory: Mapping[str, float] = field(default_factory=dict)
    radius: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """Who does what in round `round` (from 1); clients in client-id order."""

    round: int
    tasks: tuple[ClientTask, ...]


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """What a client sends back. tensors: the factors it trained, in the wire's dtype. num_examples: rows owned, as declared; num_trained: rows trained on this round.

    num_tokens: input tokens seen with gradient; num_reference_tokens: without (reference and generation).
    loss: mean of the training loss over the optimiser steps; loss_trace: its mean over every `logging_steps` steps. memory: see ClientTask.
    base_fingerprint: of the base it trained on. update_norm, factor_norm, product_norm: measured by the server (aggregation.reduce.UpdateNorms).
    module_norms: update_norm module by module.
    """

    client_id: int
    round: int
    run_id: str
    tensors: Tensors
    num_examples: int
    num_trained: int
    num_steps: int
    num_tokens: int
    num_reference_tokens: int = 0
    seconds: float
    loss: float
    loss_trace: tuple[float, ...] = ()
    memory: Mapping[str, float] = field(default_factory=dict)
    base_fingerprint: str = ""
    update_norm: float = 0.0
    factor_norm: float = 0.0
    module_norms: Mapping[str, float] = field(default_factory=dict)
    product_norm: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ClientOutcome:
    """One client's line in a round's history. reason: empty where the update counted, else the gate's code.

    weight: its share of the mean; capped: gate.max_client_share held it down. update_norm: ||s_k B_k A_k - s B A|| over all modules;
    factor_norm: the same of what it changed in A and B by themselves. Both are None where the reply did not get as far as being measured.
    stopped: why its guard ended the epoch, as it says; empty where it did not. seconds_loading: spent on loading the base for this task, beside seconds.
    """

    client_id: int
    role: Role
    weight: float
    reason: str = ""
    detail: str = ""
    capped: bool = False
    update_norm: float | None = None
    factor_norm: float | None = None
    num_examples: int = 0
    num_trained: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    num_reference_tokens: int = 0
    seconds: float = 0.0
    seconds_loading: float = 0.0
    loss: float | None = None
    loss_trace: tuple[float, ...] = ()
    stopped: str = ""
    bytes_down: int = 0
    bytes_down_reference: int = 0
    bytes_up: int = 0


@dataclass(frozen=True, kw_only=True)
class ClientScore:
    """What one client says of the global adapter on its own rows: means over num_forget and num_retain of them. reason: why it does not count; empty where it does."""

    client_id: int
    num_forget: int = 0
    num_retain: int = 0
    forget_loss: float = 0.0
    forget_prob: float = 0.0
    retain_loss: float = 0.0
    retain_prob: float = 0.0
    reason: str = ""
    detail: str = ""
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True, kw_only=True)
class ClientEvaluation:
    """Clients' own scores of a round's adapter. figures: means by examples over the clients that count; None where nobody has such rows."""

    figures: Mapping[str, float | None]
    clients: tuple[ClientScore, ...]


@dataclass(frozen=True, kw_only=True)
class RoundSeconds:
    """Wall clock of a round's parts. collecting: tasks out, replies in and judged; averaging: the server's step; evaluating: of the global adapter,
    by server and clients; writing: ledger and checkpoint, up to this line.
    """

    collecting: float = 0.0
    averaging: float = 0.0
    evaluating: float = 0.0
    writing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """One line of history.jsonl. attempt counts from 1; adapter_hash names the global adapter after the round; seconds: the sum of its parts.

    averaged: what made the mean (a reducer of ours, or a Flower strategy, which works per factor). aggregation_error: ||exact product -
    what is sent|| / ||exact product||, before the server optimiser's step; None where nothing was averaged, or it is no number. notes: what the gate did not
    do, and why. evaluation: metrics of the global adapter after the round, where eval.every_n_rounds asks for them; by_clients: the
    clients' own, where eval.clients_every_n_rounds does.
    """

    round: int
    attempt: int
    adapter_hash: str
    seconds: float
    parts: RoundSeconds = RoundSeconds()
    clients: tuple[ClientOutcome, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    averaged: str = ""
    aggregation_error: float | None = None
    notes: tuple[str, ...] = ()
    evaluation: Mapping[str, float | None] = field(default_factory=dict)
    by_clients: ClientEvaluation | None = None
