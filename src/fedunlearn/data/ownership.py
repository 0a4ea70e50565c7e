"""Ownership: the partition made once, written beside the run, and read again by unlearning and by the oracle."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from fedunlearn.config.data import PartitionConfig
from fedunlearn.config.run import TrainRun
from fedunlearn.data.benchmark import Benchmark
from fedunlearn.errors import NotApplicableError, UserError
from fedunlearn.files import write_json
from fedunlearn.partitions.base import Partitioner
from fedunlearn.partitions.by_author import ByAuthor
from fedunlearn.records.partition import OwnedRows, Partition
from fedunlearn.records.requests import Request

log = logging.getLogger(__name__)
FILE = "partition.json"


def make_partition(config: PartitionConfig, data: Benchmark, num_clients: int) -> Partition:
    """Deals the authors of `full`. Raises UserError for more clients than authors, and where a scheme deals one to two clients."""
    num_rows, size = data.num_rows, data.rows_per_author
    num_authors = num_rows // size
    if num_rows % size:
        raise UserError(
            f"{data.key}={data.path!r}: full has {num_rows} rows, no whole number of authors at {size} rows each; fetch the data again, "
            "or correct rows_per_author in the folder's tofu.json"
        )
    if num_clients > num_authors:
        raise UserError(
            f"trainer.federated.num_clients={num_clients} exceeds the {num_authors} {data.unit}s of {data.path!r} (an {data.unit} is never split): "
            f"allowed are 1 to {num_authors}; lower it"
        )
    made = deal(config.scheme or ByAuthor(), data, num_clients)
    if fault := _shared_fault(made):
        raise UserError(f"partition.scheme={dict(made.scheme)} {fault}")
    return made


def deal(scheme: Partitioner, data: Benchmark, num_clients: int) -> Partition:
    """Gives what a scheme deals, unchecked."""
    size = data.rows_per_author
    dealt = scheme.deal(data.num_rows // size, num_clients)
    rows = tuple(tuple(author * size + i for author in authors for i in range(size)) for authors in dealt)
    return Partition(clients=rows, rows_per_author=size, data_hash=data.hash("full"), scheme=_record_of(scheme))


def _record_of(scheme: Partitioner) -> dict[str, object]:
    return {"name": type(scheme).__name__, **asdict(scheme)}  # type: ignore[call-overload]


def find_partition(config: PartitionConfig, run: Path | None, data: Benchmark, num_clients: int) -> Partition:
    """Gives the partition of `path`, else of the run that the adapter comes from, else a new one (with a warning where an adapter came without).

    Raises UserError where a file is unreadable, of other data, of another number of clients, or of another scheme than asked for, and where it
    gives a row to two clients.
    """
    if config.path is not None:
        path = Path(config.path)
        found = read_partition(path / FILE if path.is_dir() else path)
    elif run is not None:
        found = read_partition(run / FILE)
    else:
        return make_partition(config, data, num_clients)
    _check(found, config, data, num_clients)
    if run is not None and read_partition(run / FILE).hash != found.hash:
        raise UserError(
            f"partition.path={config.path!r} gives rows to other clients than {str(run / FILE)!r}, by which the adapter was trained: "
            "a client can unlearn its own rows only; leave partition.path out"
        )
    return found


def _check(found: Partition, config: PartitionConfig, data: Benchmark, num_clients: int) -> None:
    faults = []
    if found.data_hash != data.hash("full"):
        faults.append(
            f"the partition was made over other data than {data.key}={data.path!r}: use the data of the fine-tuning run"
        )
    else:
        faults += [fault for fault in (_rows_fault(found, data),) if fault]
    if found.num_clients != num_clients:
        faults.append(
            f"trainer.federated.num_clients={num_clients}, but the partition has {found.num_clients} clients: set trainer.federated.num_clients={found.num_clients}"
        )
    if config.path is None and config.scheme is not None and found.scheme != _record_of(config.scheme):
        scheme = _record_of(config.scheme)
        faults.append(
            f"partition {scheme} is asked for, but the fine-tuning run has {dict(found.scheme)}: choose the same, or partition=inherit"
        )
    if faults:
        raise UserError(*faults)


def _rows_fault(found: Partition, data: Benchmark) -> str:
    """Rows that are not there or have two owners, and authors that are not whole, in a partition made by hand; empty where there is no fault."""
    num_rows, size = data.num_rows, data.rows_per_author
    if found.rows_per_author != size:
        return f"the partition says rows_per_author={found.rows_per_author}, {data.key}={data.path!r} has {size}: correct the partition"
    if fault := _shared_fault(found):
        return f"the partition {fault}"
    owner = {row: client for client, rows in enumerate(found.clients) for row in rows}
    outside = [row for row in owner if not 0 <= row < num_rows]
    if outside:
        return f"the partition gives client {owner[outside[0]]} row {outside[0]}, full has rows 0 to {num_rows - 1}: correct the partition"
    for first in range(0, num_rows, size):
        if len({owner.get(row) for row in range(first, min(first + size, num_rows))}) > 1:
            return f"the partition splits the author of rows {first} to {first + size - 1}: an author belongs whole to one client, or to none"
    return ""


def _shared_fault(partition: Partition) -> str:
    """What a partition does where a row has two owners; empty where none has."""
    rows = [row for owned in partition.clients for row in owned]
    return "gives a row to two clients: every row has one owner" if len(set(rows)) != len(rows) else ""


def read_partition(path: Path) -> Partition:
    """Reads partition.json. Raises UserError where it is missing, damaged, or was changed by hand without its hash; who may own what is find_partition's to judge."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        partition = Partition(
            clients=tuple(tuple(_whole(row) for row in rows) for rows in data["clients"]),
            rows_per_author=_whole(data["rows_per_author"]),
            data_hash=str(data["data_hash"]),
            scheme=dict(data["scheme"]),
        )
    except FileNotFoundError as error:
        raise UserError(
            f"partition.path={str(path)!r} does not exist: name a partition.json or a run's folder"
        ) from error
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"partition {str(path)!r} is no partition file ({error!r}): take that of the fine-tuning run"
        ) from error
    if data.get("hash") not in (None, partition.hash):
        raise UserError(
            f"partition {str(path)!r} does not match the hash in it: it was changed after it was written; take the one that was "
            "written, or delete its key 'hash' where the change is meant"
        )
    return partition


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def write_partition(path: Path, partition: Partition) -> None:
    """Writes partition.json atomically."""
    write_json(path, {**asdict(partition), "hash": partition.hash})


def owned_rows(kind: str, partition: Partition, request: Request, *, replays: bool = False) -> tuple[OwnedRows, ...]:
    """Gives each client's rows for a run of that kind (data.rows), in the partition's order: to train on, or to forget and to retain.

    Rows of earlier requests are in neither, and a client that is gone has none. num_owned counts what the client owns in this federation: in the
    oracle, and where fine-tuning is replayed, the forget rows do not exist; elsewhere they count, whatever the role.
    """
    asked = frozenset(request.rows) if kind == "forget_and_retain" else frozenset()
    return tuple(_owned(client, rows, asked, request, replays) for client, rows in enumerate(partition.clients))


def _owned(client: int, rows: tuple[int, ...], asked: frozenset[int], request: Request, replays: bool) -> OwnedRows:
    if client in request.gone:
        return OwnedRows(client_id=client, forget=(), retain=(), num_owned=0)
    forget = tuple(row for row in rows if row in asked)
    untouched = request.all.isdisjoint(rows)  # most are, and the partition's own tuple then serves for both
    retain = rows if untouched else tuple(row for row in rows if row not in request.all)
    num_owned = len(retain) if replays else len(forget) + len(retain)
    return OwnedRows(client_id=client, forget=forget, retain=retain, num_owned=num_owned)


def check_ownership(run: TrainRun, data: Benchmark, partition: Partition, request: Request) -> None:
    """Raises UserError for rows without a client and clients without rows, NotApplicableError for owners that are gone where they must work, and for
    those without retain rows under a retain term; all of a kind at once.
    """
    clients = owned_rows(run.data.rows, partition, request, replays=run.replays)
    faults = [_gap_fault(run, data, partition), *(_empty_fault(run, rows, data, partition) for rows in clients)]
    faults = [fault for fault in faults if fault]
    if faults:
        raise UserError(*faults)
    forbidden = _absence_faults(run) or [fault for rows in clients if (fault := _retain_fault(run, rows))]
    if forbidden:
        raise NotApplicableError(*forbidden)


def _absence_faults(run: TrainRun) -> list[str]:
    """What the absence of a request's owners forbids."""
    server, at = run.server_method, f"requests with target=gone beside method {type(run.method).__name__}"
    if run.mode == "train" or all(request.target != "gone" for request in run.requests or ()):
        return []
    if server is None:
        return [
            f"{at}: with its owners gone nobody can unlearn their rows; choose a server-side method such as rollback, or target=stays"
        ]
    if tuple(server.owner_rounds(run.total_rounds)):
        return [
            f"{at}, for which the owners must unlearn or ascend themselves: choose rollback, federaser, negation or fused, or target=stays"
        ]
    return []


def _gap_fault(run: TrainRun, data: Benchmark, partition: Partition) -> str:
    """Rows that training would leave out because nobody owns them; empty where there is none, or where that is meant."""
    owned = {row for rows in partition.clients for row in rows}
    unowned = [row for row in range(data.num_rows) if row not in owned]
    if run.mode != "train" or not unowned:
        return ""
    if run.partition.allow_gaps:
        log.warning("%d rows of full belong to no client of the partition: nobody trains on them", len(unowned))
        return ""
    return (
        f"partition.path={run.partition.path!r}: {len(unowned)} rows of full (first: row {unowned[0]}) belong to no client, and nobody would train on "
        "them: give them to one, or set partition.allow_gaps=true"
    )


def _empty_fault(run: TrainRun, rows: OwnedRows, data: Benchmark, partition: Partition) -> str:
    where = f"client {rows.client_id} of {run.trainer.federated.num_clients}"
    forgotten = bool(partition.clients[rows.client_id])  # it owned forgotten rows only: idle from then on
    if not rows.forget and not rows.retain and not forgotten and not run.data.allow_empty_clients:
        return (
            f"{where} has no row to train on ({data.path}, {run.data.rows}): lower trainer.federated.num_clients, "
            "choose another partition, or set data.allow_empty_clients=true (it then stands idle)"
        )
    return ""


def _retain_fault(run: TrainRun, rows: OwnedRows) -> str:
    where = f"client {rows.client_id} of {run.trainer.federated.num_clients}"
    if rows.forget and not rows.retain and run.local_method is not None and run.local_method.retain != "none":
        return (
            f"{where} owns forget rows only ({len(rows.forget)} of the request), but method {type(run.local_method).__name__} has "
            f"retain={run.local_method.retain!r}: set method.retain=none and method.alpha=0, or lower trainer.federated.num_clients"
        )
    return ""
