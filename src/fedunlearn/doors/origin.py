"""What server-side methods ask of the run an adapter comes from, and what a ledger may weigh: checked before anything is written."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedunlearn.aggregation.choices import trained_in
from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.data.ownership import FILE as PARTITION
from fedunlearn.data.ownership import read_partition
from fedunlearn.data.requests import own_request
from fedunlearn.errors import NotApplicableError, UserError
from fedunlearn.federation.ledger import Ledger, estimated_bytes
from fedunlearn.federation.past import Past, ancestry, find_past
from fedunlearn.federation.site import WIRE_DTYPES
from fedunlearn.protocols.base import Stage
from fedunlearn.records.adapter import Adapter
from fedunlearn.records.ledger import LedgerEntry
from fedunlearn.records.partition import OwnedRows, Partition
from fedunlearn.records.requests import Request
from fedunlearn.server_methods.base import Origin, ServerMethod

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
READS_PAST = ("origin", "rollback", "rewind", "others")
"""Beginnings that are fine-tuning's."""


def past_of(
    run: TrainRun, plain: Mapping[str, Any], source: Path | None, partition: Partition, request: Request
) -> Past | None:
    """Gives the fine-tuning run that the method reads; None where it reads none.

    Raises UserError where there is no such run, its ledger is missing or broken, the method is not defined after it, a replay has other settings,
    or what is to be subtracted was subtracted before.
    """
    method = run.server_method
    if method is None or not (method.reads_ledger or method.beginning in READS_PAST):
        return None
    name = type(method).__name__
    past = find_past(source, name)
    targets, all_targets = partition.owners(request.rows), partition.owners(request.all)
    why = (
        method.check_origin(_origin_of(past))
        or _triplets_fault(past)
        or _ranks_fault(past)
        or _sequence_fault(method, past, source)
    )
    if why:
        raise NotApplicableError(f"method {name} is not defined after {str(past.folder)!r}: {why}")
    if method.beginning in READS_PAST:
        past.check_kept(past.round_of(method, all_targets))
    if method.reads_contributions:
        _check_still_there(name, source, targets)
    if method.reads_ledger:
        _check_ledger(past, _entries_read(run, method, past, targets, all_targets))
    if method.replays:
        _check_same(name, past, plain)
    return past


def check_ledgers(run: TrainRun, source: Path | None) -> None:
    """Raises UserError where a ledger that the request purges at its end is broken: found then, the run could not end."""
    for folder, _ in ancestry(source) if run.mode == "unlearn" and run.ledger.purge else ():
        if Ledger(folder).exists:
            Ledger(folder).entries()


def _origin_of(past: Past) -> Origin:
    chosen = past.run.aggregation
    return Origin(
        strategy=past.strategy.rpartition(".")[2],
        reducer=chosen.reducer,
        residual=chosen.residual,
        masked=chosen.mask != "both",
        sidecar_rank=chosen.sidecar_rank,
    )


def _triplets_fault(past: Past) -> str:
    lora = past.run.model.model_args.lora_config
    if lora is None or lora.adalora is None:
        return ""
    return "it gave out ranks by AdaLoRA, and its rounds hold triplets B diag(E) A, no pairs: choose a local method, or fine-tune with peft_type=LORA"


def _ranks_fault(past: Past) -> str:
    if not past.run.ranks_differ:
        return ""
    return "its clients had ranks or alphas of their own (partition.ranks, lora_alphas), and what the server remembers of them wants one: choose a local method, or fine-tune with one rank"


def _sequence_fault(method: ServerMethod, past: Past, source: Path | None) -> str:
    """A method that begins at fine-tuning's last round, and not at the adapter as it is, would bring back what requests in between took."""
    if method.beginning != "others" or source is None or source.resolve() == past.folder.resolve():
        return ""
    return f"it begins at that run's last round, and {str(source)!r}, from which the adapter comes, has forgotten something since: choose another method"


def _entries_read(
    run: TrainRun, method: ServerMethod, past: Past, targets: Collection[int], all_targets: Collection[int]
) -> list[LedgerEntry]:
    """What the method reads of the ledger with its tensors, which must not have been purged."""
    found: list[LedgerEntry] = []
    if method.reads_contributions:
        mine = [e for e in past.entries if e.kind == "update" and e.weight > 0 and e.client_id in targets]
        rounds = {entry.round for entry in mine}
        found += [*mine, *(e for e in past.entries if e.kind == "global" and e.round in rounds)]
    stages = [Stage(round=number, num_rounds=run.total_rounds) for number in range(1, run.total_rounds + 1)]
    others = [method.origin_round(stage.round) for stage in stages if method.as_they_were(stage)]
    others += [past.num_rounds] if method.beginning == "others" else []
    for number in others:
        found += [entry for client, entry in past.updates(number).items() if client not in all_targets]
    return found


def _check_ledger(past: Past, wanted: Collection[LedgerEntry]) -> None:
    """Every file that is there is what the chain says; of those that were purged only what the method reads is missed."""
    ledger, read = Ledger(past.folder), {entry.hash for entry in wanted}
    for entry in past.entries:
        if entry.hash in read or (entry.kind != "parent" and ledger.path(entry).is_file()):
            ledger.read(entry)


def _check_still_there(name: str, source: Path | None, owners: Collection[int]) -> None:
    """Raises NotApplicableError where a request in between took the same clients' contributions away, or replayed fine-tuning without them."""
    for folder, config in ancestry(source):
        served = parse_config(config)
        method = served.server_method if isinstance(served, TrainRun) else None
        if method is None or not (method.reads_contributions or method.replays):
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
