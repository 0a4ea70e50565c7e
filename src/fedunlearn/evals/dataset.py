"""A data set as an evaluation sees it, whichever benchmark it is from."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

import torch

from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.errors import UserError
from fedunlearn.metrics.base import Metric, Part, readings_of
from fedunlearn.seeds import seed_of


@dataclass(frozen=True)
class Continuation:
    """How far generation goes, where a data set says so. max_new_tokens: at most; fewer where eval.max_new_tokens is lower. stops: texts before which an answer ends, looked
    for one after the other.
    """

    max_new_tokens: int
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class EncodedSet:
    """A data set as token ids; entry i of each tuple belongs to row i.

    name: what it is called in messages. plain: the answers themselves. perturbed: wrong answers, as many in each row. paraphrased: empty where there are none.
    prompts, truths: what generation begins with, and the answer as cleaned and stripped text; empty where there is nothing to ask. continuation: None: as the config says.
    """

    name: str
    plain: tuple[EncodedRow, ...]
    perturbed: tuple[tuple[EncodedRow, ...], ...]
    paraphrased: tuple[EncodedRow, ...]
    prompts: tuple[tuple[int, ...], ...]
    truths: tuple[str, ...]
    continuation: Continuation | None = None


class DataSet(Protocol):
    """Rows that are evaluated."""

    @property
    def name(self) -> str:
        """What was asked for: a forget split, another split, or `request`."""

    @property
    def split(self) -> str:
        """Where its rows lie in the benchmark, for messages and in provenance."""

    @property
    def hash(self) -> str:
        """sha256 of all of its rows, before any cut."""

    @property
    def lacking(self) -> str:
        """Why there is nothing to compare with; empty where there is."""

    @property
    def unread(self) -> frozenset[Part]:
        """What of its rows there is not."""

    @property
    def num_rows(self) -> int:
        """How many rows are evaluated."""

    def only(self, places: Sequence[int]) -> Self:
        """Gives the same data set with these of its rows, in this order; the hash stays that of all."""

    def encode(self, chat: ChatFormat) -> EncodedSet:
        """Tokenises the rows. Raises UserError naming one that does not fit."""


Sets = Mapping[str, DataSet]
R = TypeVar("R")


@dataclass(frozen=True)
class RowSet(Generic[R]):
    """What data sets made of rows share; see DataSet. rows: those that are evaluated; hash: of all, before any cut."""

    name: str
    split: str
    rows: tuple[R, ...]
    hash: str
    lacking: str = ""
    unread: frozenset[Part] = frozenset()

    @property
    def num_rows(self) -> int:
        """See DataSet.num_rows."""
        return len(self.rows)

    def only(self, places: Sequence[int]) -> Self:
        """See DataSet.only."""
        return replace(self, rows=tuple(self.rows[place] for place in places))


def asked_sets(metrics: Mapping[str, Metric], known: Collection[str], benchmark: str) -> frozenset[str]:
    """The data sets that metrics read. Raises UserError for one that is not among those known."""
    for name, metric in metrics.items():
        for reading in metric.reads:
            if reading.dataset not in known:
                raise UserError(
                    f"eval.metrics.{name} reads the data set {reading.dataset!r}, which {benchmark} has not; known: {', '.join(known)}"
                )
    return frozenset(reading.dataset for reading in readings_of(metrics))


def check_parts(metrics: Mapping[str, Metric], sets: Sets) -> None:
    """Raises UserError for a metric that reads of a data set what it has not."""
    for name, metric in metrics.items():
        for reading in metric.reads:
            data = sets[reading.dataset]
            if reading.part in data.unread:
                raise UserError(
                    f"eval.metrics.{name} reads {reading.part.value!r} of {reading.dataset!r}, and {data.split} has none: take it out (~eval.metrics.{name}), "
                    "or let it read another data set"
                )


def drawn_rows(count: int, wanted: int | None, *seed: object) -> list[int]:
    """Gives `wanted` of `count` places, in order (None, or more than there are: all), by the seed's parts alone."""
    if wanted is None or wanted >= count:
        return list(range(count))
    generator = torch.Generator().manual_seed(seed_of("evaluated rows", *seed))
    return sorted(torch.randperm(count, generator=generator)[:wanted].tolist())
