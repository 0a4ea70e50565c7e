"""TOFU (Maini et al. 2024, arXiv:2401.06121): fictitious authors, question by question, split into forget and retain.

A row's place in `full` says whose it is: author = row // rows_per_author. Questions repeat, so no row is ever keyed by one.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import TypeVar

from fedunlearn.data.benchmark import Benchmark
from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.data.hub import RawRow
from fedunlearn.data.tofu_sources import Source, open_source
from fedunlearn.errors import UserError

ROWS_PER_AUTHOR = 20
T = TypeVar("T")


@dataclass(frozen=True)
class QaRow:
    """One question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class PerturbedRow(QaRow):
    """A question with wrong answers (5 for forget and retain, 3 for real authors and world facts).

    paraphrased_question, paraphrased_answer: forget and retain only.
    """

    perturbed_answers: tuple[str, ...]
    paraphrased_answer: str | None = None
    paraphrased_question: str | None = None


class Tofu:
    """The splits of one TOFU, read when first asked for and then kept; a Benchmark.

    path: folder or hub id, for messages. rows_per_author: consecutive rows of `full` that belong to one author.
    """

    key, unit = "tofu_path", "author"

    def __init__(self, path: str, source: Source) -> None:
        self.path = path
        self.rows_per_author = source.layout().get("rows_per_author", ROWS_PER_AUTHOR)
        if self.rows_per_author < 1:
            raise UserError(
                f"tofu_path={path!r}: tofu.json says rows_per_author={self.rows_per_author}; it must be at least 1"
            )
        self._source = source
        self._raw: dict[str, tuple[RawRow, ...]] = {}
        self._kept: dict[str, tuple[QaRow, ...]] = {}
        self._kept_perturbed: dict[str, tuple[PerturbedRow, ...]] = {}

    @property
    def num_rows(self) -> int:
        """Rows of `full`."""
        return len(self.rows("full"))

    def rows(self, split: str) -> tuple[QaRow, ...]:
        """Gives question and answer of a split such as `full` or `forget10`; raises UserError where split or column is missing."""
        return self._keep(self._kept, split, self._qa_row)

    def perturbed(self, split: str) -> tuple[PerturbedRow, ...]:
        """Gives the rows of `<split>_perturbed`; split: `forget10`, `retain`, `real_authors`, `world_facts`. Raises as `rows` does."""
        return self._keep(self._kept_perturbed, f"{split}_perturbed", self._perturbed_row)

    def hash(self, split: str) -> str:
        """Gives the sha256 of the texts of a split's rows, in order, perturbed answers included for `<name>_perturbed`."""
        return hash_rows(
            self.perturbed(split.removesuffix("_perturbed")) if split.endswith("_perturbed") else self.rows(split)
        )

    def check_splits(self, forget_split: str, retain_split: str) -> None:
        """See the function of this name."""
        check_splits(self, forget_split, retain_split)

    def forget_rows(self, forget_split: str) -> tuple[int, ...]:
        """Gives the numbers in `full` of a forget split's rows: the last ones."""
        return tuple(range(self.num_rows - len(self.rows(forget_split)), self.num_rows))

    def encode(self, chat: ChatFormat, numbers: Sequence[int]) -> tuple[EncodedRow, ...]:
        """Gives rows of `full` as examples, one each, in order. Raises UserError naming the first row that does not fit."""
        rows = ((number, self.row(number)) for number in numbers)
        return tuple(chat.encode(row.question, row.answer, f"full row {number}") for number, row in rows)

    def row(self, number: int) -> QaRow:
        """One row of `full`."""
        return self.rows("full")[number]

    def _keep(self, kept: dict[str, tuple[T, ...]], split: str, make: Callable[[RawRow, str], T]) -> tuple[T, ...]:
        if split not in kept:
            if split not in self._raw:
                self._raw[split] = self._source.read(split)
            kept[split] = tuple(make(raw, f"{split} row {i}") for i, raw in enumerate(self._raw[split]))
        return kept[split]

    def _qa_row(self, raw: RawRow, where: str) -> QaRow:
        return QaRow(self._text(raw, "question", where), self._text(raw, "answer", where))

    def _perturbed_row(self, raw: RawRow, where: str) -> PerturbedRow:
        wrong = raw.get("perturbed_answer")
        if not isinstance(wrong, list) or not wrong or not all(isinstance(answer, str) for answer in wrong):
            raise self._missing(where, "perturbed_answer", "a list of texts")
        return PerturbedRow(
            question=self._text(raw, "question", where),
            answer=self._text(raw, "answer", where),
            perturbed_answers=tuple(wrong),
            paraphrased_answer=self._text_or_none(raw, "paraphrased_answer", where),
            paraphrased_question=self._text_or_none(raw, "paraphrased_question", where),
        )

    def _text_or_none(self, raw: RawRow, column: str, where: str) -> str | None:
        return None if raw.get(column) is None else self._text(raw, column, where)

    def _text(self, raw: RawRow, column: str, where: str) -> str:
        value = raw.get(column)
        if not isinstance(value, str):
            raise self._missing(where, column, "a text")
        return value

    def _missing(self, where: str, column: str, kind: str) -> UserError:
        return UserError(
            f"tofu_path={self.path!r}: {where} needs {kind} in column {column!r}; see the columns of locuslab/TOFU, correct the file or take another tofu_path"
        )


def hash_rows(rows: Sequence[QaRow]) -> str:
    """Gives the sha256 of all texts of the rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(astuple(row), ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()


def load_tofu(tofu_path: str) -> Tofu:
    """Opens TOFU at a local folder (laid out as on the hub) or under a hub id such as `locuslab/TOFU`; no split is read yet.

    A folder may hold `tofu.json` with `rows_per_author` and `authors`. A hub id is asked for once; without network the cache of
    `datasets` is used. Raises UserError where the path is neither.
    """
    return Tofu(tofu_path, open_source(tofu_path))


def as_tofu(data: Benchmark) -> Tofu:
    """The benchmark as TOFU, for what reads questions and answers. Raises ValueError for any other: the config has refused that before."""
    if not isinstance(data, Tofu):
        raise ValueError(f"{data.path} has no questions and answers to train on")
    return data


def check_splits(tofu: Tofu, forget_split: str, retain_split: str) -> None:
    """Raises UserError unless forgetXX and retainYY are the two parts of `full`: XX + YY = 100, forget = full[-n:], retain = full[:-n].

    The rows are compared, not only counted; forget must be whole authors.
    """
    share, rest = (
        re.fullmatch(rf"{kind}(\d\d)", name) for kind, name in (("forget", forget_split), ("retain", retain_split))
    )
    if share is None or rest is None or int(share[1]) + int(rest[1]) != 100 or not int(share[1]):
        raise UserError(
            f"forget_split={forget_split!r} and retain_split={retain_split!r} are no pair: allowed are forgetXX and retainYY with XX + YY = 100, "
            "such as forget10 with retain90"
        )
    full, forget, retain = tofu.rows("full"), tofu.rows(forget_split), tofu.rows(retain_split)
    if (*retain, *forget) != full:
        raise UserError(
            f"forget_split={forget_split!r} ({len(forget)} rows) and retain_split={retain_split!r} ({len(retain)} rows) of tofu_path={tofu.path!r} "
            f"are not the end and the beginning of its full ({len(full)} rows); fetch the data again: all three must come from one TOFU"
        )
    if len(forget) % tofu.rows_per_author:
        raise UserError(
            f"forget_split={forget_split!r} has {len(forget)} rows, no whole number of authors at {tofu.rows_per_author} rows each; "
            "choose another split, or correct rows_per_author in the folder's tofu.json"
        )
