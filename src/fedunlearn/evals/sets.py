"""The data sets of a TOFU evaluation, as the request leaves them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.data.tofu import PerturbedRow, Tofu, hash_rows
from fedunlearn.errors import UserError
from fedunlearn.evals.dataset import EncodedSet, RowSet, asked_sets, check_parts
from fedunlearn.evals.generation import clean
from fedunlearn.metrics.base import Part
from fedunlearn.records.requests import Request

REQUEST = "request"


@dataclass(frozen=True)
class QuestionSet(RowSet[PerturbedRow]):
    """Questions with their answers, right and wrong; a DataSet. lacking: why there are no wrong answers to compare with; empty where there are."""

    def encode(self, chat: ChatFormat) -> EncodedSet:
        """Every question with each of its answers, and alone."""
        return encode_set(chat, self.split, self.rows)


SPLITS = {"retain": "retain", "ra": "real_authors", "wf": "world_facts"}
KNOWN = ("forget", *SPLITS, "holdout")
PLAIN_ONLY = ("real_authors", "world_facts")
PARAPHRASED = frozenset({Part.PARAPHRASED})


def read_sets(
    tofu: Tofu, forget_split: str, settings: EvalConfig, request: Request | None = None
) -> Mapping[str, QuestionSet]:
    """Gives `forget`, and the other data sets that settings.metrics read, by these names; the first settings.max_rows rows of each.

    request: what was asked for where that is not the split: its rows are the forget set, and no row that it or an earlier one took is in the
    retain set. Wrong answers exist for rows of the split only: where one lacks them the set has none.
    Raises UserError where forget or retain rows lack a paraphrased answer, real authors or world facts have one (their metrics use none), a split is missing,
    a metric reads a data set that there is not, or the holdout is of another size than the forget split.
    """
    wanted = {"forget", *asked_sets(settings.metrics, KNOWN, "TOFU")}
    sets = {"forget": _plain(tofu, forget_split)}
    sets |= {name: _plain(tofu, split) for name, split in SPLITS.items() if name in wanted}
    for data in sets.values():
        _check_paraphrases(tofu, data)
    if "holdout" in wanted:
        sets["holdout"] = _holdout(tofu, forget_split, settings.holdout_split)
    check_parts(settings.metrics, sets)
    if request is not None and not _is_split(tofu, forget_split, request):
        sets["forget"] = _asked_for(tofu, forget_split, request, sets["forget"])
        if "retain" in sets:
            sets["retain"] = _kept(tofu, request, sets["retain"])
    asked = {
        name: _asking(tofu, data, settings) if name in ("forget", "retain") else data for name, data in sets.items()
    }
    return {name: replace(data, rows=data.rows[: settings.max_rows]) for name, data in asked.items()}


def _holdout(tofu: Tofu, forget_split: str, given: str | None) -> QuestionSet:
    """All rows of holdoutXX; XX is the forget split's."""
    split = f"holdout{forget_split.removeprefix('forget')}"
    if given is not None and given != split:
        raise UserError(
            f"eval.holdout_split={given!r} beside forget_split={forget_split!r}: an attack compares sides of one size; set it to {split!r}, or null"
        )
    rows = tuple(PerturbedRow(row.question, row.answer, ()) for row in tofu.rows(split))
    return QuestionSet(split, split, rows, tofu.hash(split), unread=PARAPHRASED | {Part.PERTURBED})


def _asking(tofu: Tofu, data: QuestionSet, settings: EvalConfig) -> QuestionSet:
    """The rows with the question that eval.question_key names. Raises UserError where one has no paraphrased question."""
    if settings.question_key == "question":
        return data
    lacking = [i for i, row in enumerate(data.rows) if row.paraphrased_question is None]
    if lacking:
        raise UserError(
            f"eval.question_key=paraphrased_question: {data.split} row {lacking[0]} of tofu_path={tofu.path!r} has none; set it to question, or take another tofu_path"
        )
    rows = tuple(replace(row, question=str(row.paraphrased_question)) for row in data.rows)
    return replace(data, rows=rows)


def _plain(tofu: Tofu, split: str) -> QuestionSet:
    name = f"{split}_perturbed"
    unread = PARAPHRASED if split in PLAIN_ONLY else frozenset()
    return QuestionSet(split, name, tofu.perturbed(split), tofu.hash(name), unread=unread)


def _is_split(tofu: Tofu, forget_split: str, request: Request) -> bool:
    return request.rows == tofu.forget_rows(forget_split) and not request.before


def _asked_for(tofu: Tofu, forget_split: str, request: Request, known: QuestionSet) -> QuestionSet:
    full, first = tofu.rows("full"), tofu.forget_rows(forget_split)[0]
    lacking = [row for row in request.rows if row < first]
    if lacking:
        rows = tuple(PerturbedRow(full[row].question, full[row].answer, ()) for row in request.rows)
        why = f"{len(lacking)} of {len(rows)} rows (first: row {lacking[0]} of full) have no wrong or paraphrased answers in {known.split}"
        return QuestionSet(REQUEST, REQUEST, rows, hash_rows(rows), why)
    rows = tuple(known.rows[row - first] for row in request.rows)
    return QuestionSet(REQUEST, REQUEST, rows, hash_rows(rows))


def _kept(tofu: Tofu, request: Request, retain: QuestionSet) -> QuestionSet:
    full = tofu.rows("full")
    taken = {(full[row].question, full[row].answer) for row in request.all}
    rows = tuple(row for row in retain.rows if (row.question, row.answer) not in taken)
    lacking = "" if rows else f"every row of {retain.split} was asked to be forgotten, and none is left"
    return QuestionSet(retain.name, retain.split, rows, hash_rows(rows), lacking)


def _check_paraphrases(tofu: Tofu, data: QuestionSet) -> None:
    wanted = Part.PARAPHRASED not in data.unread
    for i, row in enumerate(data.rows):
        if (row.paraphrased_answer is not None) != wanted:
            raise UserError(
                f"tofu_path={tofu.path!r}: {data.split} row {i} must {'' if wanted else 'not '}have a column 'paraphrased_answer' "
                "(as in locuslab/TOFU); correct the file, or take another tofu_path"
            )


def encode_set(chat: ChatFormat, name: str, rows: Sequence[PerturbedRow]) -> EncodedSet:
    """Tokenises the rows of a data set. Raises UserError naming a row that does not fit."""

    def encode(place: int, answer: str) -> EncodedRow:
        return chat.encode(rows[place].question, answer, f"{name} row {place}")

    return EncodedSet(
        name=name,
        plain=tuple(encode(i, row.answer) for i, row in enumerate(rows)),
        perturbed=tuple(tuple(encode(i, answer) for answer in row.perturbed_answers) for i, row in enumerate(rows)),
        paraphrased=tuple(
            encode(i, row.paraphrased_answer) for i, row in enumerate(rows) if row.paraphrased_answer is not None
        ),
        prompts=tuple(chat.prompt(row.question) for row in rows),
        truths=tuple(clean(row.answer).strip() for row in rows),
    )
