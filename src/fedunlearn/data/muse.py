"""MUSE (Shi et al. 2024, arXiv:2407.06460): news articles or books to train on as raw text, and questions, passages and texts about them.

Row i of `full` is an article: those of raw/forget first, then those of raw/retain1. Whose it is the partition says, article by article: with partition=round_robin, which
experiment=.../muse/default takes, article i belongs to client i mod K. MUSE itself knows no owners: this is a definition of ours.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.data.hub import RawRow
from fedunlearn.data.muse_sources import KEY, MuseSource, open_muse_source
from fedunlearn.data.tofu import QaRow
from fedunlearn.errors import UserError

FORGET, RETAIN = "forget", "retain1"
FULL = "full"
JOINED_BY = "\n\n"


@dataclass(frozen=True)
class Passage:
    """The beginning of an article, and how it goes on."""

    prompt: str
    continuation: str


class Muse:
    """The subsets of one MUSE, read when first asked for and then kept; a Benchmark.

    path: folder or hub id, for messages.
    """

    key, unit = KEY, "article"
    rows_per_author = 1

    def __init__(self, path: str, source: MuseSource) -> None:
        self.path = path
        self._source = source
        self._raw: dict[tuple[str, str], tuple[RawRow, ...]] = {}

    @property
    def num_rows(self) -> int:
        """Articles of raw/forget and raw/retain1."""
        return len(self._articles)

    def texts(self, subset: str, split: str) -> tuple[str, ...]:
        """Gives the column `text` of raw/... or privleak/...; raises UserError where subset, split or column is missing, or a text is empty."""
        return tuple(text for (text,) in self._columns(subset, split, "text"))

    def questions(self, split: str) -> tuple[QaRow, ...]:
        """Gives knowmem/<split>; raises as `texts` does."""
        return tuple(
            QaRow(question, answer) for question, answer in self._columns("knowmem", split, "question", "answer")
        )

    def passages(self, split: str) -> tuple[Passage, ...]:
        """Gives verbmem/<split>; raises as `texts` does."""
        return tuple(Passage(prompt, rest) for prompt, rest in self._columns("verbmem", split, "prompt", "gt"))

    def hash(self, split: str) -> str:
        """Gives the sha256 of all texts of `full`, or of `<subset>/<split>`, in order."""
        if split == FULL:
            return hash_texts([(text,) for text in self._articles])
        subset, _, name = split.partition("/")
        columns = {"knowmem": ("question", "answer"), "verbmem": ("prompt", "gt")}.get(subset, ("text",))
        return hash_texts(self._columns(subset, name, *columns))

    def check_splits(self, forget_split: str, retain_split: str) -> None:
        """Raises UserError for any other pair than `forget` and `retain1`, and where an article cannot be read."""
        if (forget_split, retain_split) != (FORGET, RETAIN):
            raise UserError(
                f"forget_split={forget_split!r} and retain_split={retain_split!r} beside {KEY}={self.path!r}: MUSE's pair is forget_split={FORGET} with retain_split={RETAIN} "
                "(raw/...; scal and sust are not read); set these"
            )
        for split in (FORGET, RETAIN):
            self.texts("raw", split)

    def forget_rows(self, forget_split: str) -> tuple[int, ...]:
        """Gives the numbers in `full` of raw/<forget_split>: the first ones."""
        return tuple(range(len(self.texts("raw", forget_split))))

    def encode(self, chat: ChatFormat, numbers: Sequence[int]) -> tuple[EncodedRow, ...]:
        """Gives articles as chunks: those of raw/forget joined by a blank line and cut, then those of raw/retain1 likewise, each in the order given.

        Raises UserError where articles have so few tokens that nothing can be learned from them.
        """
        num_forget = len(self.texts("raw", FORGET))
        sides = ([n for n in numbers if n < num_forget], [n for n in numbers if n >= num_forget])
        return tuple(row for side in sides if side for row in self._chunks(chat, side))

    def _chunks(self, chat: ChatFormat, numbers: Sequence[int]) -> tuple[EncodedRow, ...]:
        found = chat.chunks(JOINED_BY.join(self._articles[number] for number in numbers))
        if not found:
            raise UserError(
                f"{KEY}={self.path!r}: full row {numbers[0]} (an article; {len(numbers)} together) has fewer than two tokens, and nothing to predict: take it out"
            )
        return found

    @cached_property
    def _articles(self) -> tuple[str, ...]:
        return (*self.texts("raw", FORGET), *self.texts("raw", RETAIN))

    def _columns(self, subset: str, split: str, *names: str) -> list[tuple[str, ...]]:
        if (subset, split) not in self._raw:
            self._raw[subset, split] = self._source.read(subset, split)
        rows = self._raw[subset, split]
        if not rows:
            raise UserError(
                f"{KEY}={self.path!r}: {subset}/{split} has no row; fetch the data again, or take another {KEY}"
            )
        return [
            tuple(self._text(row, name, f"{subset}/{split} row {i}") for name in names) for i, row in enumerate(rows)
        ]

    def _text(self, row: RawRow, column: str, where: str) -> str:
        value = row.get(column)
        if not isinstance(value, str):
            raise UserError(
                f"{KEY}={self.path!r}: {where} needs a text in column {column!r} and has {', '.join(map(repr, row)) or 'none'}; see the columns of "
                f"muse-bench/MUSE-News, correct the file or take another {KEY}"
            )
        if not value.strip():
            raise UserError(
                f"{KEY}={self.path!r}: {where} is empty in column {column!r}; take the row out, or fetch the file again"
            )
        return value


def hash_texts(rows: Sequence[Sequence[str]]) -> str:
    """Gives the sha256 of all texts of the rows, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(list(row), ensure_ascii=False).encode("utf-8") + b"\n")
    return digest.hexdigest()


def load_muse(muse_path: str) -> Muse:
    """Opens MUSE at a local folder (laid out as on the hub) or under a hub id such as `muse-bench/MUSE-News`; no split is read yet.

    A hub id is asked for once; without network the cache of `datasets` is used. Raises UserError where the path is neither.
    """
    return Muse(muse_path, open_muse_source(muse_path))
