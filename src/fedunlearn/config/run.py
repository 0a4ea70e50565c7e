"""The whole configuration of a run, as the doors hand it on: one frozen record a kind of run."""

from dataclasses import dataclass, field
from typing import Literal

from fedunlearn.aggregation.base import ServerOptimizer
from fedunlearn.config.data import (
    AggregationConfig,
    CollatorConfig,
    DataConfig,
    EvalConfig,
    PartitionConfig,
    PathsConfig,
)
from fedunlearn.config.launcher import Launcher
from fedunlearn.config.model import ModelConfig
from fedunlearn.config.trainer import TrainerConfig
from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method
from fedunlearn.protocols.base import Protocol


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """Fine-tuning, the retrain oracle (mode `train`) or unlearning (mode `unlearn`).

    tofu_path: hub id, folder or `pocket:SEED`. retain_logs_path: TOFU_EVAL.json of the oracle, for forget_quality.
    task_name: folder under saves/<finetune|unlearn>/; a name, no path.
    """

    task_name: str
    mode: Literal["train", "unlearn"]
    tofu_path: str
    forget_split: str
    retain_split: str
    model: ModelConfig
    trainer: TrainerConfig
    strategy: ServerOptimizer
    protocol: Protocol
    partition: PartitionConfig
    launcher: Launcher
    data: DataConfig
    method: Method | None = None
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    collator: CollatorConfig = field(default_factory=CollatorConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    retain_logs_path: str | None = None
    pocket_seed: int = 0
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        faults = [fault for holds, fault in self._rules() if not holds]
        if faults:
            raise UserError(*faults)

    def _rules(self) -> list[tuple[bool, str]]:
        unlearn = self.mode == "unlearn"
        want = "FederatedUnlearningTrainer" if unlearn else "FederatedTrainer"
        rows = ("forget_and_retain",) if unlearn else ("full", "retain")
        return [
            _task_name_rule(self.task_name),
            (
                self.trainer.name == want,
                f"trainer.name={self.trainer.name!r} does not fit mode={self.mode!r}: choose trainer={want}, or the other --config-name",
            ),
            (
                self.data.rows in rows,
                f"data.rows={self.data.rows!r} does not fit mode={self.mode!r}: allowed here: {', '.join(rows)}",
            ),
            (
                (self.method is not None) == unlearn,
                "method must be given for unlearning (unlearn-lora.yaml) and only there",
            ),
            (
                self.protocol.unlearns == unlearn,
                f"protocol {type(self.protocol).__name__} does not fit mode={self.mode!r}",
            ),
            (
                self.model.model_args.use_lora,
                "model.model_args.use_lora=false in a federated run: only adapters travel; set use_lora=true",
            ),
            (
                not (self.overwrite and self.resume),
                "overwrite=true beside resume=true: choose one (start anew, or go on)",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class EvalRun:
    """Evaluation of a base, an adapter or a run; the result goes to saves/eval/<task_name>/."""

    task_name: str
    mode: Literal["eval"]
    tofu_path: str
    forget_split: str
    retain_split: str
    model: ModelConfig
    launcher: Launcher
    eval: EvalConfig = field(default_factory=EvalConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    retain_logs_path: str | None = None
    pocket_seed: int = 0
    overwrite: bool = False
    resume: bool = False
    max_length: int = 512

    def __post_init__(self) -> None:
        holds, fault = _task_name_rule(self.task_name)
        if not holds:
            raise UserError(fault)


def _task_name_rule(name: str) -> tuple[bool, str]:
    plain = (
        bool(name.strip())
        and name == name.strip()
        and name not in (".", "..")
        and not any(mark in name for mark in "/\\\0")
    )
    return plain, f"task_name={name!r} must be a plain folder name: no separators, no blanks around it"
