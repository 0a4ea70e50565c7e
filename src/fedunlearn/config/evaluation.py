"""The record of the group `eval`."""

from dataclasses import dataclass, field, replace
from typing import Literal

from fedunlearn.errors import UserError
from fedunlearn.metrics.base import Metric, Part, in_order

RESERVED = "provenance"
_OR_NULL = {
    **dict.fromkeys(("max_rows", "round_rows", "client_rows"), " or null (all rows)"),
    **dict.fromkeys(("every_n_rounds", "clients_every_n_rounds"), " or null (never)"),
}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What an evaluation computes, what it costs, and which definitions it takes.

    name: the benchmark. metrics: by their names in the result's file. at_end: evaluate the result of a training or unlearning run. max_rows: rows of each data
    set (null: all; else the result is marked as a trial). batch_tokens: padded tokens of one scoring batch. generation_batch_size: rows generated at once.
    max_new_tokens: tokens of an answer; data sets with a smaller limit of their own (MUSE's) keep that.
    compat: null = our definitions; `open-unlearning` = theirs, for comparison with published logs. question_key: which question of forget and retain rows is asked.
    holdout_split: rows that nobody trained on, for attacks; null: that of the forget split. reference_model_path: base, adapter or run that mia_reference compares with.
    gradnorm_of: whose gradients mia_gradnorm takes (see evals.gradnorm).
    every_n_rounds: evaluate the global adapter after every n-th round (null: never): round_metrics, on round_rows rows of each data set (null: all), drawn by the run's seed.
    clients_every_n_rounds: let every client score the global adapter on its own rows after every n-th round (null: never), on client_rows forget and retain rows each (null: all).
    """

    name: Literal["tofu", "muse"] = "tofu"
    metrics: dict[str, Metric] = field(default_factory=dict)
    at_end: bool = True
    max_rows: int | None = None
    batch_tokens: int = 8192
    generation_batch_size: int = 32
    max_new_tokens: int = 200
    compat: Literal["open-unlearning"] | None = None
    question_key: Literal["question", "paraphrased_question"] = "question"
    holdout_split: str | None = None
    reference_model_path: str | None = None
    gradnorm_of: Literal["model", "adapter"] = "model"
    every_n_rounds: int | None = None
    round_metrics: tuple[str, ...] = ("forget_Q_A_Prob", "retain_Q_A_Prob")
    round_rows: int | None = 40
    clients_every_n_rounds: int | None = None
    client_rows: int | None = 40

    def __post_init__(self) -> None:
        for key in (
            "max_rows",
            "batch_tokens",
            "generation_batch_size",
            "max_new_tokens",
            "every_n_rounds",
            "round_rows",
            "clients_every_n_rounds",
            "client_rows",
        ):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"eval.{key}={value} must be at least 1{_OR_NULL.get(key, '')}")
        in_order(self.metrics)
        if RESERVED in self.metrics:
            raise UserError(f"eval.metrics.{RESERVED} is the name of a block in the result's file: choose another")
        self._check_reference()
        if self.every_n_rounds is not None:
            self._check_rounds()

    @property
    def in_rounds(self) -> bool:
        """Whether anything is evaluated while rounds go on."""
        return self.every_n_rounds is not None or self.clients_every_n_rounds is not None

    def for_rounds(self) -> "EvalConfig":
        """The evaluation of a round: round_metrics and what they are made of."""
        chosen = {name: self.metrics[name] for name in in_order(self.metrics, self.round_metrics)}
        return replace(self, metrics=chosen, max_rows=None, every_n_rounds=None)

    def _check_rounds(self) -> None:
        unknown = [name for name in self.round_metrics if name not in self.metrics]
        if unknown or not self.round_metrics:
            raise UserError(
                f"eval.round_metrics={list(self.round_metrics)} must name some of eval.metrics: {', '.join(self.metrics)}"
            )
        for name in in_order(self.metrics, self.round_metrics):
            metric = self.metrics[name]
            if metric.reads_log is not None or any(one.part is Part.REFERENCE for one in metric.reads):
                raise UserError(
                    f"eval.round_metrics: {name} compares with another model, which a round's evaluation of some rows cannot; take it out"
                )

    def _check_reference(self) -> None:
        reading = [name for name, one in self.metrics.items() if any(part.part is Part.REFERENCE for part in one.reads)]
        if reading and self.reference_model_path is None:
            raise UserError(
                f"eval.metrics.{reading[0]} compares with another model and eval.reference_model_path is null: name a base, an adapter or a run (such as the oracle's), "
                f"or take it out (~eval.metrics.{reading[0]})"
            )
