"""What server-side methods ask of the run an adapter comes from, and what a ledger may weigh: checked before anything is written."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedunlearn.aggregation.choices import trained_in
from fedunlearn.config.run import TrainRun
from fedunlearn.data.ownership import FILE as PARTITION
from fedunlearn.data.ownership import read_partition
from fedunlearn.data.requests import own_request
from fedunlearn.errors import NotApplicableError, UserError
from fedunlearn.federation.ledger import Ledger, estimated_bytes
from fedunlearn.federation.past import Past, ancestry, find_past
from fedunlearn.federation.site import WIRE_DTYPES
from fedunlearn.records.adapter import Adapter
from fedunlearn.records.partition import OwnedRows, Partition
from fedunlearn.records.requests import Request
from fedunlearn.server_methods.base import Origin

SAME = (
    "trainer.args",
    "trainer.federated",
    "strategy",
    "aggregation",
    "robust",
    "data.max_length",
    "partition.joins",
    "gate",
    "trainer.guard",
    "collator",
)
"""What a replay must share with the run that it replays."""
FREE = (
    "min_clients",
    "round_timeout",
    "roll_call_timeout",
    "max_retries",
    "keep_rounds",
    "force_owners",
    "logging_steps",
    "report_to",
)
"""And what it need not: nothing of these acts on the result of a run that comes to its end."""


def past_of(
    run: TrainRun, plain: Mapping[str, Any], source: Path | None, partition: Partition, request: Request
) -> Past | None:
    """Gives the fine-tuning run that the method reads; None where it reads none.

    Raises UserError where there is no such run, its ledger is missing or broken, the method is not defined after it, a replay has other settings,
    or what is to be subtracted was subtracted before.
    """
    method = run.server_method
    if method is None or not (method.reads_ledger or method.beginning in ("origin", "rollback", "rewind", "others")):
        return None
    name = type(method).__name__
    past = find_past(source, name)
    if method.reads_ledger:
        _check_ledger(past)
    chosen = past.config["aggregation"]
    strategy = str(past.config["strategy"]["_target_"]).rpartition(".")[2]
    why = method.check_origin(
        Origin(
            strategy=strategy, reducer=chosen["reducer"], residual=chosen["residual"], masked=chosen["mask"] != "both"
        )
    )
    if why:
        raise NotApplicableError(f"method {name} is not defined after {str(past.folder)!r}: {why}")
    if method.beginning in ("origin", "rollback", "rewind"):
        past.check_kept(past.round_of(method, partition.owners(request.all)))
    if method.reads_contributions:
        _check_still_there(name, source, plain["method"]["_target_"], partition.owners(request.rows))
    if method.replays:
        _check_same(name, past, plain)
    return past


def _check_ledger(past: Past) -> None:
    """Every file that is there is what the chain says; those that were purged are told when they are read."""
    ledger = Ledger(past.folder)
    for entry in past.entries:
        if entry.kind != "parent" and ledger.path(entry).is_file():
            ledger.read(entry)


def _check_still_there(name: str, source: Path | None, target: str, owners: Collection[int]) -> None:
    """Raises NotApplicableError where a request in between took the same clients' contributions away: they hold for all their rows at once."""
    for folder, config in ancestry(source):
        if config["mode"] != "unlearn" or config["method"]["_target_"] != target:
            continue
        again = read_partition(folder / PARTITION).owners(own_request(folder).rows) & set(owners)
        if again:
            raise NotApplicableError(
                f"method {name}: {str(folder)!r} took the contributions of clients {sorted(again)} away already, all of them, and this would do it "
                "a second time: choose another method for what is left of their rows"
            )


def _check_same(name: str, past: Past, plain: Mapping[str, Any]) -> None:
    faults = []
    for key in SAME:
        there, here = _leaves(_at(past.config, key), key), _leaves(_at(plain, key), key)
        faults += [
            f"{leaf}={_told(here.get(leaf))}, but {str(past.folder)!r} had {_told(there.get(leaf))}"
            for leaf in sorted(there.keys() | here.keys())
            if there.get(leaf) != here.get(leaf) and leaf.rpartition(".")[2] not in FREE
        ]
    if faults:
        raise UserError(
            *(
                f"method {name} replays fine-tuning and must have its settings: {fault}; set it so, or take experiment=replay/... of the same recipe"
                for fault in faults
            )
        )


def _at(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value[part]
    return value


def _leaves(tree: Any, key: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {key: tree}
    return {leaf: value for name, item in tree.items() for leaf, value in _leaves(item, f"{key}.{name}").items()}


def _told(value: object) -> str:
    return json.dumps(value)


def check_ledger_size(run: TrainRun, start: Adapter, owned: Sequence[OwnedRows]) -> None:
    """Raises UserError where the ledger of a whole run would need more than ledger.max_bytes."""
    if not run.ledger.enabled:
        return
    size = {name: tensor.numel() for name, tensor in start.tensors.items()}
    bytes_of = WIRE_DTYPES[run.trainer.federated.wire_dtype].itemsize
    largest = max(
        sum(count for name, count in size.items() if trained_in(run.aggregation.mask, number).covers(name))
        for number in (1, 2)
    )
    federated = run.trainer.federated
    forced = sum(1 for rows in owned if rows.forget) if federated.force_owners else 0
    clients = min(federated.cohort_size + forced, federated.num_clients)
    needed = estimated_bytes(4 * sum(size.values()), bytes_of * largest, len(size), run.total_rounds, clients)
    if needed > run.ledger.max_bytes:
        raise UserError(
            f"ledger.max_bytes={run.ledger.max_bytes}: {run.total_rounds} rounds of {run.trainer.federated.cohort_size} clients need up to {needed} bytes: "
            "raise it, lower num_rounds or the clients drawn, send bfloat16 (trainer.federated.wire_dtype), or set ledger.enabled=false"
        )
