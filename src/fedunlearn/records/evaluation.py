"""What an evaluation is made of: scores of answers, generated texts, and the metrics that are pure functions of the two."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Compat = Literal["open-unlearning"] | None
Definition = str
OURS, THEIRS = "log-space", "open-unlearning"
RowValue = float | str | tuple[float, ...]
Row = Mapping[str, RowValue]


def definition_of(compat: Compat) -> Definition:
    """Names the definitions in force: ours (log space, masks by length), or open-unlearning's (1e-10 in linear space, masks by pad id).

    A metric with more than one definition adds to the name.
    """
    return OURS if compat is None else compat


class Detail(IntEnum):
    """How much is kept of an answer's score; each level holds those below it."""

    LOSS = 0
    TOKENS = 1
    MOMENTS = 2


Floats = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One answer label by label, T of them: `logp` [T], log-probability in nats; `hit` [T] bool, whether it is the likeliest token.

    mu, sigma2 (Detail.MOMENTS): [T], mean and variance of log p(v) over v ~ p, before any floor. Float32, or the model's dtype where that is wider.
    """

    logp: Floats
    hit: NDArray[np.bool_]
    mu: Floats | None = None
    sigma2: Floats | None = None


@dataclass(frozen=True)
class AnswerScore:
    """One answer under the model.

    avg_loss: mean negative log-likelihood of its labels, in nats; prob: exp(-avg_loss); both are float32 numbers held as
    Python floats (float64 where the model is). num_labels: tokens of the answer and what closes it. tokens: from Detail.TOKENS on.
    """

    avg_loss: float
    prob: float
    num_labels: int
    tokens: TokenScores | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one data set; entry i of each tuple belongs to row i.

    plain: the answer itself. perturbed: the wrong answers in order, as many in each row (none where the data set has none). paraphrased: empty where the data set
    has no paraphrased answers (real authors, world facts). label_texts: the plain answers' labels as text, cleaned, not stripped. reference: the plain answers under
    the reference model. gradnorms: see evals.gradnorm. Whatever no metric reads is empty.
    """

    plain: tuple[AnswerScore, ...] = ()
    perturbed: tuple[tuple[AnswerScore, ...], ...] = ()
    paraphrased: tuple[AnswerScore, ...] = ()
    label_texts: tuple[str, ...] = ()
    reference: tuple[AnswerScore, ...] = ()
    gradnorms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        parts = (
            self.plain,
            self.perturbed,
            self.paraphrased,
            self.label_texts,
            self.reference,
            self.gradnorms,
        )
        assert len({len(part) for part in parts if part}) <= 1, "one entry for every row, or none"

    @property
    def compares(self) -> bool:
        """Whether there are wrong answers to compare with, in every row."""
        return bool(self.perturbed) and all(self.perturbed)


@dataclass(frozen=True)
class Generations:
    """Greedy continuations of one data set's questions; entry i of each tuple belongs to row i.

    inputs: the prompts as text, without special tokens. ground_truths, generations: cleaned and stripped.
    """

    inputs: tuple[str, ...]
    ground_truths: tuple[str, ...]
    generations: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.inputs) == len(self.ground_truths) == len(self.generations), "three texts a row"


@dataclass(frozen=True)
class MetricResult:
    """One metric: its aggregate, the rows it came from, and which definition it follows.

    agg_value: None where there is nothing to aggregate (no retain log). value_by_index: entry i belongs to row i.
    parts: results of the sides of an attack (`forget`, `holdout`). Raises ValueError on NaN or infinity: neither reaches a file.
    """

    agg_value: float | None
    definition: Definition
    value_by_index: tuple[Row, ...] = ()
    parts: Mapping[str, "MetricResult"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = [] if self.agg_value is None else [self.agg_value]
        for row in self.value_by_index:
            for value in row.values():
                values += value if isinstance(value, tuple) else [value] if isinstance(value, float) else []
        if not all(map(math.isfinite, values)):
            raise ValueError("a metric holds NaN or infinity: its scores were not checked to be finite")

    def column(self, name: str) -> tuple[float, ...]:
        """Gives one number a row; raises KeyError where a row lacks it and ValueError where it is no number."""
        values = [row[name] for row in self.value_by_index]
        for value in values:
            if not isinstance(value, int | float):
                raise ValueError(f"column {name!r} holds {value!r}, which is no number")
        return tuple(float(value) for value in values if isinstance(value, int | float))


@dataclass(frozen=True)
class EvalLog:
    """A whole evaluation. metrics: by their names in TOFU_EVAL.json. provenance: what it was made of; empty in a log of open-unlearning.

    file_hash: sha256 of the file it was read from, byte by byte; None where it was made here. Two logs of the same content are equal without it.
    """

    metrics: Mapping[str, MetricResult]
    provenance: Mapping[str, object]
    file_hash: str | None = field(default=None, compare=False)
