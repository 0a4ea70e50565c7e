"""The interface of a metric, and the evidence that it is a function of."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fedunlearn.errors import UserError
from fedunlearn.records.evaluation import (
    Compat,
    EvalLog,
    Generations,
    MetricResult,
    ScoreTable,
    definition_of,
)


class Part(StrEnum):
    """What of a data set's rows a metric may read."""

    PLAIN = "plain"
    PARAPHRASED = "paraphrased"
    PERTURBED = "perturbed"
    TOKENS = "tokens"
    MOMENTS = "moments"
    LABEL_TEXT = "label_text"
    REFERENCE = "reference"
    GRADNORM = "gradnorm"
    TEXTS = "texts"


@dataclass(frozen=True)
class Reading:
    """A part of one data set (`forget`, `retain`, `ra`, `wf`, `holdout`).

    plain, paraphrased, perturbed: scores of these answers. tokens, moments: the plain answers' label by label (records.evaluation.Detail). label_text: their labels as text.
    reference: the plain answers under the model of eval.reference_model_path. gradnorm: see evals.gradnorm. texts: generations.
    """

    dataset: str
    part: Part


@dataclass(frozen=True, kw_only=True)
class LogReading:
    """A metric of another model's log that is read: its rows' scores (`rows`), or its aggregate alone."""

    metric: str
    rows: bool


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that metrics read. tables, texts: by data set, as far as somebody reads them. metrics: those computed so far, by name. retain: the oracle's log, or None.

    compat: which definitions are in force.
    """

    tables: Mapping[str, ScoreTable]
    texts: Mapping[str, Generations] = field(default_factory=dict)
    metrics: Mapping[str, MetricResult] = field(default_factory=dict)
    retain: EvalLog | None = None
    compat: Compat = None


class Metric(ABC):
    """A pure function of evidence. Members are frozen dataclasses; `eval.metrics` composes them under the names they have in TOFU_EVAL.json."""

    @property
    def reads(self) -> frozenset[Reading]:
        """What it reads of the passes."""
        return frozenset()

    @property
    def made_of(self) -> tuple[str, ...]:
        """The metrics that it reads, by name: they are computed first."""
        return ()

    @property
    def reads_log(self) -> LogReading | None:
        """What it reads of the retain log, where there is one."""
        return None

    def definition(self, compat: Compat) -> str:
        """The name under which its numbers are stored: numbers of two names are never compared."""
        return definition_of(compat)

    @abstractmethod
    def compute(self, found: Evidence) -> MetricResult:
        """Gives the metric; agg_value is None where there is nothing to aggregate."""


def in_order(metrics: Mapping[str, Metric], asked: Iterable[str] | None = None) -> Sequence[str]:
    """Gives the names asked for (all) and what they are made of, such that each stands after its parts. Raises UserError for one that is missing, and for circles."""
    done: dict[str, None] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UserError(f"eval.metrics: {' -> '.join((*above, name))} is a circle; take one of them out")
        if name not in metrics:
            raise UserError(
                f"eval.metrics.{above[-1]} is made of {name!r}, which is not among eval.metrics: add it, or take {above[-1]} out (~eval.metrics.{above[-1]})"
            )
        for part in metrics[name].made_of:
            visit(part, (*above, name))
        done[name] = None

    for name in metrics if asked is None else asked:
        visit(name, ())
    return list(done)


def compute_metrics(metrics: Mapping[str, Metric], found: Evidence) -> dict[str, MetricResult]:
    """Gives every metric of evidence, by name, in name order. Raises UserError as in_order does."""
    results: dict[str, MetricResult] = {}
    for name in in_order(metrics):
        evidence = Evidence(
            tables=found.tables, texts=found.texts, metrics=results, retain=found.retain, compat=found.compat
        )
        results[name] = metrics[name].compute(evidence)
    return dict(sorted(results.items()))


def readings_of(metrics: Mapping[str, Metric]) -> frozenset[Reading]:
    """What all of them read together."""
    return frozenset(reading for metric in metrics.values() for reading in metric.reads)
