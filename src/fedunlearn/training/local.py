"""The records of one client's round: what it has, how it trains, what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass, field

from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.trainer import GuardArgs, TrainArgs
from fedunlearn.data.chat import EncodedRow
from fedunlearn.methods.base import Method
from fedunlearn.methods.tokens import Memory
from fedunlearn.records.adapter import Tensors
from fedunlearn.training.reference import ReferenceSums


@dataclass(frozen=True, eq=False, kw_only=True)
class OtherAnswers:
    """Each forget row's alternates. counts: how many there are of each. encode: (row's place, which of them) -> tokens."""

    counts: tuple[int, ...]
    encode: Callable[[int, int], EncodedRow]


@dataclass(frozen=True, eq=False, kw_only=True)
class LocalData:
    """A client's own tokenised rows, split by the request.

    alternates: of the forget rows, where the method needs some. reference: sums under the reference, likewise.
    tokens: what making this cost in tokens without gradient (alternates that were sampled).
    """

    forget: tuple[EncodedRow, ...]
    retain: tuple[EncodedRow, ...]
    alternates: OtherAnswers | None = None
    reference: ReferenceSums | None = None
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """How a client trains; the same for all clients of a run. max_steps: optimiser steps that the client's owner allows a task, None: any number."""

    args: TrainArgs
    collator: CollatorConfig
    method: Method | None
    retain_per_forget: int = 1
    guard: GuardArgs = field(default_factory=GuardArgs)
    max_steps: int | None = None


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """The trained adapter and its account. num_trained: distinct rows of the steps it began (unlearn: of its forget rows). num_tokens: input tokens seen with
    gradient; num_reference_tokens: without (reference and generation).

    loss: mean over optimiser steps, NaN where the guard let none be made; loss_trace: its mean over every args.logging_steps steps. memory: what the client remembers for later rounds.
    stopped: why the guard ended the epoch; empty where it did not.
    """

    tensors: Tensors
    num_trained: int
    num_steps: int
    num_tokens: int
    num_reference_tokens: int
    seconds: float
    loss: float
    loss_trace: tuple[float, ...]
    memory: Memory
    stopped: str
