"""The data sets of a MUSE evaluation (arXiv:2407.06460), by open-unlearning's rules.

knowmem: questions behind ten answered ones. verbmem: how a passage goes on. privleak: texts, for attacks.
"""

from dataclasses import dataclass

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.data.chat import ChatFormat, EncodedRow, Shots
from fedunlearn.data.muse import Muse, Passage, hash_texts
from fedunlearn.data.tofu import QaRow
from fedunlearn.errors import UserError
from fedunlearn.evals.dataset import Continuation, EncodedSet, RowSet, Sets, asked_sets, check_parts
from fedunlearn.evals.generation import clean, decode
from fedunlearn.metrics.base import Part

FORGET_TEXTS, HOLDOUT_TEXTS = "forget_privleak", "holdout_privleak"
KNOWLEDGE_TOKENS, VERBATIM_TOKENS = 32, 128
STOPS = ("\n\n", "\nQuestion", "Question:")
KNOWN = ("forget_knowmem", "retain_knowmem", "forget_verbmem", FORGET_TEXTS, "retain_privleak", HOLDOUT_TEXTS)
COMPARED = frozenset({Part.PARAPHRASED, Part.PERTURBED})


@dataclass(frozen=True, kw_only=True)
class Knowledge(RowSet[QaRow]):
    """knowmem/<side>_qa. shots: all of knowmem/<side>_qa_icl, which stand answered before each question. hash: of both."""

    shots: Shots
    unread: frozenset[Part] = COMPARED

    def encode(self, chat: ChatFormat) -> EncodedSet:
        """32 new tokens at most, cut at the eos text, a blank line or the next question, in turn. Raises UserError for a row longer than max_length."""
        eos = chat.tokenizer.eos_token
        return EncodedSet(
            name=self.split,
            plain=tuple(
                chat.encode(row.question, row.answer, f"{self.split} row {i}", self.shots)
                for i, row in enumerate(self.rows)
            ),
            perturbed=((),) * len(self.rows),
            paraphrased=(),
            prompts=tuple(chat.prompt(row.question, self.shots) for row in self.rows),
            truths=tuple(clean(row.answer).strip() for row in self.rows),
            continuation=Continuation(KNOWLEDGE_TOKENS, (*([eos] if eos else []), *STOPS)),
        )


@dataclass(frozen=True, kw_only=True)
class Verbatim(RowSet[Passage]):
    """verbmem/forget: the prompt and the text that follows it, tokenised together with a blank between and cut max_length ids after the prompt."""

    unread: frozenset[Part] = COMPARED

    def encode(self, chat: ChatFormat) -> EncodedSet:
        """128 new tokens at most; the truth is the text of the labels, decoded. Raises UserError for a prompt longer than max_length, or without a label behind it."""
        rows = tuple(self._encode(chat, i, row) for i, row in enumerate(self.rows))
        eos = chat.tokenizer.eos_token
        return EncodedSet(
            name=self.split,
            plain=rows,
            perturbed=((),) * len(rows),
            paraphrased=(),
            prompts=tuple(chat.text(row.prompt) for row in self.rows),
            truths=tuple(decode(chat, row.labels).strip() for row in rows),
            continuation=Continuation(VERBATIM_TOKENS, (eos,) if eos else ()),
        )

    def _encode(self, chat: ChatFormat, place: int, row: Passage) -> EncodedRow:
        where, start = f"{self.split} row {place}", len(chat.text(row.prompt))
        if start > chat.max_length:
            raise UserError(
                f"{where} has a prompt of {start} tokens, more than max_length={chat.max_length} (in training: data.max_length); prompts are never cut: set it to {start} or above, "
                "or take the row out"
            )
        ids = chat.text(f"{row.prompt} {row.continuation}")[: start + chat.max_length]
        if len(ids) <= start:
            raise UserError(
                f"{where} has no token left behind its prompt: the two together are {len(ids)} tokens, the prompt alone {start}; correct the row, or take it out"
            )
        return EncodedRow(ids, start)


@dataclass(frozen=True, kw_only=True)
class Texts(RowSet[str]):
    """privleak/<side>: whole texts, their first max_length ids; a label at every place but the first, which nothing stands before.

    opening: whether what the tokenizer opens a text with comes on top of max_length, as in open-unlearning.
    """

    opening: bool = False
    unread: frozenset[Part] = COMPARED | {Part.TEXTS}

    def encode(self, chat: ChatFormat) -> EncodedSet:
        """Nothing to ask. Raises UserError for a text of one token."""
        limit = chat.max_length + (len(chat.text("")) if self.opening else 0)
        rows = tuple(chat.text(text)[:limit] for text in self.rows)
        for i, ids in enumerate(rows):
            if len(ids) < 2:
                raise UserError(
                    f"{self.split} row {i} has {len(ids)} tokens, and no label: correct the row, or take it out"
                )
        return EncodedSet(
            name=self.split,
            plain=tuple(EncodedRow(ids, 1) for ids in rows),
            perturbed=((),) * len(rows),
            paraphrased=(),
            prompts=(),
            truths=(),
        )


MuseSet = Knowledge | Verbatim | Texts


def read_muse_sets(muse: Muse, settings: EvalConfig) -> Sets:
    """Gives `forget_privleak`, which a retain log must share, and the other data sets that settings.metrics read; the first settings.max_rows rows of each.

    Raises UserError where a subset, split, column or text is missing, and where a metric reads a data set, or a part of one, that there is not.
    """
    wanted = {FORGET_TEXTS, *asked_sets(settings.metrics, KNOWN, "MUSE")}
    sets = {name: _read(muse, name, settings) for name in KNOWN if name in wanted}
    check_parts(settings.metrics, sets)
    return sets


def _read(muse: Muse, name: str, settings: EvalConfig) -> MuseSet:
    side, _, subset = name.partition("_")
    first = slice(settings.max_rows)
    if subset == "knowmem":
        split, shown = f"{side}_qa", f"{side}_qa_icl"
        shots = tuple((row.question, row.answer) for row in muse.questions(shown))
        both = hash_texts([(muse.hash(f"knowmem/{split}"), muse.hash(f"knowmem/{shown}"))])
        return Knowledge(name=side, split=f"knowmem/{split}", rows=muse.questions(split)[first], shots=shots, hash=both)
    split = f"{subset}/{side}"
    if subset == "verbmem":
        return Verbatim(name=side, split=split, rows=muse.passages(side)[first], hash=muse.hash(split))
    rows = muse.texts(subset, side)[first]
    return Texts(name=side, split=split, rows=rows, hash=muse.hash(split), opening=settings.compat is not None)
