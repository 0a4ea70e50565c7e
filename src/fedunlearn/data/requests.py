"""From what a config asks for to the rows of a request, with what earlier requests took."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fedunlearn.config.requests import RequestConfig
from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.data.benchmark import Benchmark
from fedunlearn.data.ownership import FILE as PARTITION
from fedunlearn.data.ownership import read_partition
from fedunlearn.data.tofu import Tofu
from fedunlearn.errors import UserError
from fedunlearn.files import write_json
from fedunlearn.records.partition import Partition
from fedunlearn.records.requests import ReleasedRow, Request

log = logging.getLogger(__name__)
FILE, RELEASED = "request.json", "released.json"


def earlier_request(source: Path | None) -> Request:
    """Gives what the run an adapter comes from was not to know, or was asked to forget; nothing where it comes from none. Raises UserError where its request.json is damaged."""
    return (None if source is None else read_request(source)) or Request()


def find_request(run: TrainRun, earlier: Request, data: Benchmark, partition: Partition, first: int = 0) -> Request:
    """Gives the request that a run serves, or whose oracle it is. earlier: what was asked of the run that its adapter comes from. first: place of the
    run's first request in the user's list, for messages.

    Unlearning serves one request: `requests` has one, or it is the rows of forget_split. The oracle leaves out the rows of all that it names,
    plain fine-tuning none. Whatever the run, rows that were taken before stay out.
    Raises UserError for rows, authors or clients that are not there, rows that nobody owns or that are forgotten already, and where no client
    would be left with a row.
    """
    before = earlier.all
    wanted = () if run.data.rows == "full" else _wanted(run, data, partition, before, first)
    rows = wanted if run.mode == "unlearn" else tuple(row for row in wanted if row not in before)
    gone = _gone(run, data, partition, before)
    request = Request(
        rows=tuple(sorted(rows)), before=tuple(sorted(before)), gone=tuple(sorted(gone.union(earlier.gone)))
    )
    _check(run, request, data, partition, before)
    return request


def evaluated_request(run: TrainRun | EvalRun, source: Path | None, data: Benchmark) -> Request | None:
    """Gives what an evaluation's forget set is where `requests` says so, with what the run it evaluates was not to know; None: the forget split.

    Raises UserError as find_request, and for a client where no run of ours says who owns what.
    """
    earlier = None if source is None else read_request(source)
    if run.requests is None:
        if earlier is not None and earlier.rows and earlier.all != set(data.forget_rows(run.forget_split)):
            log.warning(
                "%s forgot other rows than forget_split=%s, which is evaluated: give requests= as that run had it",
                source,
                run.forget_split,
            )
        return None
    partition = None if source is None else read_partition(source / PARTITION)
    rows: dict[int, None] = {}
    for number, request in enumerate(run.requests):
        rows |= dict.fromkeys(_named(request, f"requests[{number}]", data, partition, frozenset()))
    before = frozenset() if earlier is None else earlier.all - set(rows)
    return Request(rows=tuple(sorted(rows)), before=tuple(sorted(before)))


def _wanted(
    run: TrainRun, data: Benchmark, partition: Partition, before: frozenset[int], first: int
) -> tuple[int, ...]:
    if run.requests is None:
        return data.forget_rows(run.forget_split)
    rows: dict[int, None] = {}
    for number, request in enumerate(run.requests, first):
        rows |= dict.fromkeys(_named(request, f"requests[{number}]", data, partition, before))
    return tuple(rows)


def _named(
    request: RequestConfig, key: str, data: Benchmark, partition: Partition | None, before: frozenset[int]
) -> list[int]:
    if partition is None and request.client is not None:
        raise UserError(
            f"{key}.client={request.client}: what is evaluated is no run of ours, so nobody knows whose rows are whose; name rows or authors"
        )
    num_rows, size = data.num_rows, data.rows_per_author
    faults = [
        *_outside(f"{key}.rows", request.rows or (), num_rows, "rows of full"),
        *_outside(f"{key}.authors", request.authors or (), num_rows // size, "authors"),
        *_outside(
            f"{key}.client",
            () if request.client is None else (request.client,),
            0 if partition is None else partition.num_clients,
            "clients",
        ),
    ]
    if faults:
        raise UserError(*faults)
    rows = [*(request.rows or ()), *(author * size + i for author in request.authors or () for i in range(size))]
    if request.client is not None and partition is not None:
        owned = [row for row in partition.clients[request.client] if row not in before]
        if not owned:
            raise UserError(
                f"{key}.client={request.client} owns no row that is not forgotten already: there is nothing to forget"
            )
        rows += owned
    return rows


def _outside(key: str, numbers: Sequence[int], count: int, what: str) -> list[str]:
    odd = [number for number in numbers if not 0 <= number < count]
    return [f"{key}: {odd[0]} is none of the {count} {what}: allowed are 0 to {count - 1}"] if odd else []


def _gone(run: TrainRun, data: Benchmark, partition: Partition, before: frozenset[int]) -> frozenset[int]:
    """Owners who are away, of the requests that say so."""
    away = [(number, request) for number, request in enumerate(run.requests or ()) if request.target == "gone"]
    rows = [row for number, one in away for row in _named(one, f"requests[{number}]", data, partition, before)]
    return partition.owners(rows)


def _check(run: TrainRun, request: Request, data: Benchmark, partition: Partition, before: frozenset[int]) -> None:
    owned = {row for rows in partition.clients for row in rows}
    said = f"forget_split={run.forget_split!r}" if run.requests is None else "requests"
    unowned = [row for row in request.rows if row not in owned]
    again = [row for row in request.rows if row in before]
    faults = []
    if run.mode == "unlearn" and unowned:
        faults.append(
            f"{said}: {len(unowned)} of its rows (first: row {unowned[0]} of full) belong to no client of the partition: give them to one, or choose another partition or other rows"
        )
    if again:
        faults.append(
            f"{said}: {len(again)} of its rows (first: row {again[0]} of full) are forgotten already, by the run that the adapter comes from: leave them out of requests"
        )
    if run.data.rows != "full" and owned and owned <= request.all:
        faults.append(
            f"{said}: every row of every client would be forgotten, and nothing is left to keep the model by: ask for less, or throw the adapter away"
        )
    if faults:
        raise UserError(*faults)


def write_request(folder: Path, request: Request) -> None:
    """Writes request.json into a run's folder."""
    write_json(folder / FILE, asdict(request))


def read_request(folder: Path) -> Request | None:
    """Reads a run's request.json; None where it has none (a run of an older version, or no run). Raises UserError where it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return Request(rows=_numbers(saved["rows"]), before=_numbers(saved["before"]), gone=_numbers(saved["gone"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} is damaged ({error!r}): take another run, or make that one anew with overwrite=true"
        ) from error


def own_request(folder: Path) -> Request:
    """Reads the request of a run that is under way. Raises UserError where it is missing or damaged."""
    found = read_request(folder)
    if found is None:
        raise UserError(f"{str(folder / FILE)!r} is missing: make the run anew with overwrite=true")
    return found


def write_released(folder: Path, request: Request, tofu: Tofu) -> None:
    """Writes released.json: the text of the request's rows, for clients that do not own them."""
    full = tofu.rows("full")
    write_json(folder / RELEASED, [[row, full[row].question, full[row].answer] for row in request.rows])


def read_released(folder: Path) -> tuple[ReleasedRow, ...]:
    """Reads released.json. Raises UserError where it is missing or damaged."""
    path = folder / RELEASED
    try:
        return tuple(
            ReleasedRow(int(row), str(question), str(answer))
            for row, question, answer in json.loads(path.read_text(encoding="utf-8"))
        )
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{str(path)!r} is missing or damaged ({error!r}): make the run anew with overwrite=true"
        ) from error


def _numbers(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise TypeError(f"{values!r} is no list of row numbers")
    return tuple(values)
