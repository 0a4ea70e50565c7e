"""Records of the `trainer` group: the names of transformers' TrainingArguments that are honoured, and the federation's numbers."""

import math
from dataclasses import dataclass, field
from typing import Literal

from fedunlearn.config.parallel import Parallel
from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST, SMALLEST

Optim = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "sgd",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "adamw_torch_8bit",
]


@dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Local training of one client in one round; names and meaning are those of transformers' TrainingArguments.

    num_train_epochs, max_steps (-1: by epochs), warm-up and schedule count per client and round and start anew each round.
    An epoch of unlearning is one pass over the forget rows. warmup_steps below 1 is a fraction of the steps; warmup_epochs
    counts epochs; both at once are refused. max_steps, where it is set, is what every working client does, in every role; epochs then have no say.
    logging_steps: the mean loss of every so many optimiser steps goes into the history.
    loraplus_lr_ratio: B's learning rate over that of A and of plain tensors (LoRA+, arXiv:2402.12354; its authors take 16); null or 1: the same for all.
    torch_compile: decoder blocks are compiled while they train: equal to rounding, not bit by bit, and worth its minute of compiling from some hundred steps a process on.
    optim: names that end in 8bit or begin with paged want CUDA.
    What this machine or this model cannot do is refused before training (training.able).
    """

    learning_rate: float
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    weight_decay: float = 0.0
    warmup_steps: float = 0.0
    warmup_epochs: float | None = None
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "cosine_with_restarts"
    ] = "linear"
    max_grad_norm: float = 1.0
    optim: Optim = "adamw_torch"
    loraplus_lr_ratio: float | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    dataloader_num_workers: int = 0
    remove_unused_columns: bool = True
    logging_steps: int = 10
    report_to: Literal["none", "tensorboard"] = "none"

    def __post_init__(self) -> None:
        faults = [fault for holds, fault in (*self._length_rules(), *self._step_rules()) if not holds]
        if faults:
            raise UserError(*faults)

    def _length_rules(self) -> list[tuple[bool, str]]:
        at = "trainer.args."
        return [
            (self.learning_rate >= 0, f"{at}learning_rate={self.learning_rate} must not be negative"),
            (
                0 < self.num_train_epochs <= LARGEST,
                f"{at}num_train_epochs={self.num_train_epochs} must lie in (0, 1e6]",
            ),
            (
                self.max_steps == -1 or self.max_steps > 0,
                f"{at}max_steps={self.max_steps} must be -1 (by epochs) or above 0",
            ),
            (
                self.per_device_train_batch_size > 0,
                f"{at}per_device_train_batch_size={self.per_device_train_batch_size} must be above 0",
            ),
            (
                self.gradient_accumulation_steps > 0,
                f"{at}gradient_accumulation_steps={self.gradient_accumulation_steps} must be above 0",
            ),
            (self.warmup_steps >= 0, f"{at}warmup_steps={self.warmup_steps} must not be negative"),
            (
                self.warmup_epochs is None or self.warmup_steps == 0,
                f"{at}warmup_epochs={self.warmup_epochs} beside warmup_steps={self.warmup_steps}: give one of the two",
            ),
            (
                self.warmup_epochs is None or 0 <= self.warmup_epochs <= LARGEST,
                f"{at}warmup_epochs={self.warmup_epochs} must not be negative, nor above 1e6",
            ),
            (self.logging_steps > 0, f"{at}logging_steps={self.logging_steps} must be above 0"),
            (
                self.lr_scheduler_type != "constant" or not (self.warmup_steps or self.warmup_epochs),
                f"{at}lr_scheduler_type='constant' has no warm-up: use constant_with_warmup, or leave warmup_steps and warmup_epochs out",
            ),
            (
                self.lr_scheduler_type != "polynomial" or self.learning_rate > 1e-7,
                f"{at}lr_scheduler_type='polynomial' ends at 1e-7: learning_rate={self.learning_rate} must be above it",
            ),
        ]

    def _step_rules(self) -> list[tuple[bool, str]]:
        at = "trainer.args."
        return [
            (self.weight_decay >= 0, f"{at}weight_decay={self.weight_decay} must not be negative"),
            (
                self.optim != "sgd" or (self.adam_beta1, self.adam_beta2, self.adam_epsilon) == (0.9, 0.999, 1e-8),
                f"{at}optim='sgd' reads no adam_beta1, adam_beta2 or adam_epsilon: leave them out",
            ),
            (
                self.loraplus_lr_ratio is None or SMALLEST <= self.loraplus_lr_ratio <= LARGEST,
                f"{at}loraplus_lr_ratio={self.loraplus_lr_ratio} must lie between 1e-6 and 1e6; null or 1: B learns at A's rate",
            ),
            (
                self.max_grad_norm >= 0,
                f"{at}max_grad_norm={self.max_grad_norm} must not be negative (0 switches clipping off)",
            ),
            (
                self.dataloader_num_workers == 0,
                f"{at}dataloader_num_workers={self.dataloader_num_workers} is refused: rows are tokenised once and kept in memory, and making a batch of them takes 2 ms for "
                "8 rows of 256 tokens, which no worker process could take off a step: leave it at 0",
            ),
            (
                self.remove_unused_columns,
                f"{at}remove_unused_columns=false is refused: rows are token ids only, there is no other column to keep",
            ),
            (
                0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1 and self.adam_epsilon >= 0,
                f"{at}adam_beta1={self.adam_beta1} and adam_beta2={self.adam_beta2} must lie in [0, 1), adam_epsilon={self.adam_epsilon} must not be negative",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class FederatedArgs:
    """The federation: who takes part, for how long.

    fraction_train: share of the clients drawn each round, or num_train_clients: how many (null: by fraction). force_owners: clients with forget
    rows are in every cohort, beside those drawn. min_clients: updates that must count; with fewer a round is repeated, at most max_retries
    times: those that were dropped are asked once more, then others are drawn in their place.
    round_timeout, roll_call_timeout: seconds; of a round the launcher says whose (launcher=local keeps none, with isolate=true each client's own).
    wire_dtype: what adapters are sent in, both ways; training and sums are not made in it.
    final_lr_ratio: the learning rate of the last round over that of the first, linear between them (1: constant).
    keep_rounds: checkpoints kept, newest first, or `all`.
    """

    num_clients: int
    num_rounds: int
    fraction_train: float = 1.0
    num_train_clients: int | None = None
    force_owners: bool = False
    min_clients: int = 1
    round_timeout: float = 3600.0
    roll_call_timeout: float = 300.0
    max_retries: int = 1
    final_lr_ratio: float = 1.0
    keep_rounds: int | Literal["all"] = 2
    wire_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def cohort_size(self) -> int:
        """How many clients are drawn each round; forced owners come on top."""
        if self.num_train_clients is not None:
            return self.num_train_clients
        return math.ceil(self.fraction_train * self.num_clients - 1e-9)

    def __post_init__(self) -> None:
        at = "trainer.federated."
        rules = [
            (self.num_clients > 0, f"{at}num_clients={self.num_clients} must be above 0"),
            (self.num_rounds > 0, f"{at}num_rounds={self.num_rounds} must be above 0"),
            (0 < self.fraction_train <= 1, f"{at}fraction_train={self.fraction_train} must lie in (0, 1]"),
            (
                self.cohort_size > 0
                or self.num_train_clients is not None
                or self.num_clients <= 0
                or not 0 < self.fraction_train <= 1,
                f"{at}fraction_train={self.fraction_train} of num_clients={self.num_clients} draws no client at all: raise it to {1 / max(self.num_clients, 1):.2g}, "
                "or set num_train_clients",
            ),
            (
                self.num_train_clients is None or 1 <= self.num_train_clients <= max(self.num_clients, 1),
                f"{at}num_train_clients={self.num_train_clients} must lie between 1 and num_clients={self.num_clients}, or be null (by fraction_train)",
            ),
            (
                self.num_train_clients is None or self.fraction_train == 1,
                f"{at}num_train_clients={self.num_train_clients} beside fraction_train={self.fraction_train}: give one of the two (fraction_train=1.0 is none)",
            ),
            (
                self.cohort_size < 1 or 1 <= self.min_clients <= self.cohort_size,
                f"{at}min_clients={self.min_clients} must lie between 1 and the clients drawn each round, {self.cohort_size} of num_clients={self.num_clients}: "
                "lower it, or raise fraction_train or num_train_clients",
            ),
            (
                0 < self.round_timeout <= LARGEST,
                f"{at}round_timeout={self.round_timeout} must be above 0 seconds, at most 1e6",
            ),
            (
                0 < self.roll_call_timeout <= LARGEST,
                f"{at}roll_call_timeout={self.roll_call_timeout} must be above 0 seconds, at most 1e6",
            ),
            (self.max_retries >= 0, f"{at}max_retries={self.max_retries} must not be negative"),
            (0 < self.final_lr_ratio <= 1, f"{at}final_lr_ratio={self.final_lr_ratio} must lie in (0, 1]"),
            (
                self.keep_rounds == "all" or self.keep_rounds > 0,
                f"{at}keep_rounds={self.keep_rounds} must be above 0, or all",
            ),
        ]
        faults = [fault for holds, fault in rules if not holds]
        if faults:
            raise UserError(*faults)


@dataclass(frozen=True, kw_only=True)
class GuardArgs:
    """Bounds past which a client ends its epoch: gradient ascent and its kin have no bound of their own. null switches one off.

    max_loss: absolute value of an optimiser step's loss; one that is no number is beyond it, and the step is not made. max_update_ratio: norm of
    what a client changed this round over the norm of the adapter it began with; the step that passed it was the last.
    """

    max_loss: float | None = 1e4
    max_update_ratio: float | None = 5.0

    def __post_init__(self) -> None:
        faults = [
            f"trainer.guard.{key}={getattr(self, key)} must be above 0, or null for no bound"
            for key in ("max_loss", "max_update_ratio")
            if getattr(self, key) is not None and not getattr(self, key) > 0
        ]
        if faults:
            raise UserError(*faults)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The whole `trainer` group; `name` says what the run is for, and must fit the command's mode. parallel: who carries out one client's work."""

    name: Literal["FederatedTrainer", "FederatedUnlearningTrainer"]
    args: TrainArgs
    federated: FederatedArgs
    guard: GuardArgs = field(default_factory=GuardArgs)
    parallel: Parallel = "none"
