"""The four data sets of a TOFU evaluation, as the request leaves them."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedunlearn.data.requests import split_rows
from fedunlearn.data.tofu import PerturbedRow, Tofu, hash_rows
from fedunlearn.errors import UserError
from fedunlearn.records.requests import Request

REQUEST = "request"


@dataclass(frozen=True)
class DataSet:
    """Rows that are evaluated. name: what was asked for (a forget split, or `request`); split: where they lie in TOFU, for messages; hash: of all of
    its rows, before any cut. lacking: why there are no wrong answers to compare with; empty where there are.
    """

    name: str
    split: str
    rows: tuple[PerturbedRow, ...]
    hash: str
    lacking: str = ""


Sets = Mapping[str, DataSet]


def read_sets(tofu: Tofu, forget_split: str, max_rows: int | None, request: Request | None = None) -> Sets:
    """Gives the four data sets by their names in the metrics, the first max_rows rows of each.

    request: what was asked for where that is not the split: its rows are the forget set, and no row that it or an earlier one took is in the
    retain set. Wrong answers exist for rows of the split only: where one lacks them the set has none.
    Raises UserError where forget or retain rows lack a paraphrased answer, or real authors or world facts have one: their metrics use none.
    """
    splits = {"forget": forget_split, "retain": "retain", "ra": "real_authors", "wf": "world_facts"}
    sets = {name: _plain(tofu, split) for name, split in splits.items()}
    for name, data in sets.items():
        _check_paraphrases(tofu, data, wanted=name in ("forget", "retain"))
    if request is not None and not _is_split(tofu, forget_split, request):
        sets |= {
            "forget": _asked_for(tofu, forget_split, request, sets["forget"]),
            "retain": _kept(tofu, request, sets["retain"]),
        }
    return {name: DataSet(d.name, d.split, d.rows[:max_rows], d.hash, d.lacking) for name, d in sets.items()}


def _plain(tofu: Tofu, split: str) -> DataSet:
    name = f"{split}_perturbed"
    return DataSet(split, name, tofu.perturbed(split), tofu.hash(name))


def _is_split(tofu: Tofu, forget_split: str, request: Request) -> bool:
    return request.rows == split_rows(tofu, forget_split) and not request.before


def _asked_for(tofu: Tofu, forget_split: str, request: Request, known: DataSet) -> DataSet:
    full, first = tofu.rows("full"), split_rows(tofu, forget_split)[0]
    lacking = [row for row in request.rows if row < first]
    if lacking:
        rows = tuple(PerturbedRow(full[row].question, full[row].answer, ()) for row in request.rows)
        why = f"{len(lacking)} of {len(rows)} rows (first: row {lacking[0]} of full) have no wrong or paraphrased answers in {known.split}"
        return DataSet(REQUEST, REQUEST, rows, hash_rows(rows), why)
    rows = tuple(known.rows[row - first] for row in request.rows)
    return DataSet(REQUEST, REQUEST, rows, hash_rows(rows))


def _kept(tofu: Tofu, request: Request, retain: DataSet) -> DataSet:
    full = tofu.rows("full")
    taken = {(full[row].question, full[row].answer) for row in request.all}
    rows = tuple(row for row in retain.rows if (row.question, row.answer) not in taken)
    lacking = "" if rows else f"every row of {retain.split} was asked to be forgotten, and none is left"
    return DataSet(retain.name, retain.split, rows, hash_rows(rows), lacking)


def _check_paraphrases(tofu: Tofu, data: DataSet, wanted: bool) -> None:
    for i, row in enumerate(data.rows):
        if (row.paraphrased_answer is not None) != wanted:
            raise UserError(
                f"tofu_path={tofu.path!r}: {data.split} row {i} must {'' if wanted else 'not '}have a column 'paraphrased_answer' "
                "(as in locuslab/TOFU); correct the file, or take another tofu_path"
            )
