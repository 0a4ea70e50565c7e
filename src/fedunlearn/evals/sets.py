"""The data sets of a TOFU evaluation, as the request leaves them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.data.requests import split_rows
from fedunlearn.data.tofu import PerturbedRow, Tofu, hash_rows
from fedunlearn.errors import UserError
from fedunlearn.metrics.base import readings_of
from fedunlearn.records.requests import Request
from fedunlearn.seeds import seed_of

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


SPLITS = {"retain": "retain", "ra": "real_authors", "wf": "world_facts"}
KNOWN = ("forget", *SPLITS, "holdout")


def read_sets(tofu: Tofu, forget_split: str, settings: EvalConfig, request: Request | None = None) -> Sets:
    """Gives `forget`, and the other data sets that settings.metrics read, by these names; the first settings.max_rows rows of each.

    request: what was asked for where that is not the split: its rows are the forget set, and no row that it or an earlier one took is in the
    retain set. Wrong answers exist for rows of the split only: where one lacks them the set has none.
    Raises UserError where forget or retain rows lack a paraphrased answer, real authors or world facts have one (their metrics use none), a split is missing,
    a metric reads a data set that there is not, or the holdout is of another size than the forget split.
    """
    wanted = {"forget", *_asked(settings)}
    sets = {"forget": _plain(tofu, forget_split)}
    sets |= {name: _plain(tofu, split) for name, split in SPLITS.items() if name in wanted}
    for name, data in sets.items():
        _check_paraphrases(tofu, data, wanted=name in ("forget", "retain"))
    if "holdout" in wanted:
        sets["holdout"] = _holdout(tofu, forget_split, settings.holdout_split)
    if request is not None and not _is_split(tofu, forget_split, request):
        sets["forget"] = _asked_for(tofu, forget_split, request, sets["forget"])
        if "retain" in sets:
            sets["retain"] = _kept(tofu, request, sets["retain"])
    asked = {
        name: _asking(tofu, data, settings) if name in ("forget", "retain") else data for name, data in sets.items()
    }
    return {name: replace(data, rows=data.rows[: settings.max_rows]) for name, data in asked.items()}


def _asked(settings: EvalConfig) -> frozenset[str]:
    """The data sets that metrics read. Raises UserError for one that there is not."""
    for name, metric in settings.metrics.items():
        for reading in metric.reads:
            if reading.dataset not in KNOWN:
                raise UserError(
                    f"eval.metrics.{name} reads the data set {reading.dataset!r}, which TOFU has not; known: {', '.join(KNOWN)}"
                )
    return frozenset(reading.dataset for reading in readings_of(settings.metrics))


def _holdout(tofu: Tofu, forget_split: str, given: str | None) -> DataSet:
    """All rows of holdoutXX; XX is the forget split's."""
    split = f"holdout{forget_split.removeprefix('forget')}"
    if given is not None and given != split:
        raise UserError(
            f"eval.holdout_split={given!r} beside forget_split={forget_split!r}: an attack compares sides of one size; set it to {split!r}, or null"
        )
    rows = tuple(PerturbedRow(row.question, row.answer, ()) for row in tofu.rows(split))
    return DataSet(split, split, rows, tofu.hash(split))


def _asking(tofu: Tofu, data: DataSet, settings: EvalConfig) -> DataSet:
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


def drawn_rows(count: int, wanted: int | None, *seed: object) -> list[int]:
    """Gives `wanted` of `count` places, in order (None, or more than there are: all), by the seed's parts alone."""
    if wanted is None or wanted >= count:
        return list(range(count))
    generator = torch.Generator().manual_seed(seed_of("evaluated rows", *seed))
    return sorted(torch.randperm(count, generator=generator)[:wanted].tolist())


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
