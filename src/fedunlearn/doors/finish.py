"""The end of a run: the adapter with its proof, the account of what it cost, the evaluation."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedunlearn.config.run import TrainRun
from fedunlearn.data.ownership import FILE as PARTITION
from fedunlearn.data.ownership import read_partition
from fedunlearn.doors.measure import evaluate, reference_scores
from fedunlearn.doors.prepare import Prepared, load_model
from fedunlearn.evals.files import FILES_OF, write_log
from fedunlearn.federation.checkpoint import read_history
from fedunlearn.federation.ledger import Ledger
from fedunlearn.federation.past import LEDGER_HEAD, ancestry
from fedunlearn.federation.rounds import ROLL_CALL
from fedunlearn.files import write_json
from fedunlearn.models.adapter_files import save_adapter
from fedunlearn.models.export import export
from fedunlearn.models.resident import take_probe
from fedunlearn.records.adapter import Adapter
from fedunlearn.records.evaluation import EvalLog
from fedunlearn.records.requests import Request
from fedunlearn.reporting.peak_memory import peak_memory
from fedunlearn.reporting.run_folder import DONE

log = logging.getLogger(__name__)
RESULT = "adapter"


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a run cost: optimiser steps, input tokens with and without gradient (reference, generation) and seconds of all clients together, bytes by
    direction.

    peak_memory_mib: the most that this process held since the run began or went on (reporting.peak_memory says where it can only grow); peak_device_memory_mib:
    of its CUDA tensors, None without CUDA. Workers of launcher=ray and launcher.isolate=true are processes of their own, and in neither.
    dropped: a sentence for each client whose updates did not all count, and for each that the roll call refused. stopped: one for each epoch
    that a client's guard ended.
    """

    num_steps: int
    num_tokens: int
    num_reference_tokens: int
    seconds: float
    bytes_down: int
    bytes_down_reference: int
    bytes_up: int
    peak_memory_mib: float
    peak_device_memory_mib: float | None = None
    dropped: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()


def finish(prepared: Prepared, result: Adapter, config_sha: str) -> EvalLog | None:
    """Saves the result as <folder>/adapter, evaluates it where eval.at_end says so, and marks the run as done.

    A side-car is exported with it, as aggregation.export_rank says, and AdaLoRA's ranks are folded; what is evaluated is what is saved: where its layers are not the
    model's (a stack, AdaLoRA) the model holds what it was made of.
    """
    run, log, reference = prepared.run, None, None
    if run.eval.at_end:
        reference = reference_scores(run, prepared.data, _evaluated(prepared))
    made = load_model(run, prepared.source)
    adapter, stacked = export(result, prepared.run.aggregation.export_rank)
    made.put(adapter if adapter.peft_config == result.peft_config else result)
    save_adapter(prepared.folder / RESULT, adapter, take_probe(made), stacked)
    if run.eval.at_end:
        log = evaluate(
            run, made, adapter, prepared.data, prepared.retain_log, config_sha, _evaluated(prepared), reference
        )
        write_log(log, prepared.folder, FILES_OF[run.eval.name])
    spent = account(prepared.folder)
    done: dict[str, object] = {"adapter_hash": adapter.tensor_hash, "account": asdict(spent)}
    oracle = _oracle_account(prepared.run)
    if oracle is not None:
        done["of_the_oracle"] = fractions(asdict(spent), oracle)
    if prepared.run.ledger.enabled:
        done[LEDGER_HEAD] = Ledger(prepared.folder).head
    _purge(prepared)
    write_json(prepared.folder / DONE, done)
    return log


COSTS = (
    "num_steps",
    "num_tokens",
    "num_reference_tokens",
    "seconds",
    "bytes_down",
    "bytes_down_reference",
    "bytes_up",
    "peak_memory_mib",
)


def _oracle_account(run: TrainRun) -> Mapping[str, float] | None:
    """Gives what the oracle cost, where retain_logs_path lies in the folder of its run; else None: an evaluation alone knows no cost."""
    if run.retain_logs_path is None:
        return None
    done = Path(run.retain_logs_path).parent / DONE
    if not done.is_file():
        return None
    found: Mapping[str, float] | None = json.loads(done.read_text(encoding="utf-8")).get("account")
    return found


def fractions(spent: Mapping[str, Any], oracle: Mapping[str, Any]) -> dict[str, float | None]:
    """Gives each cost as a fraction of the oracle's, and `tokens`, those with and without gradient together; None where the oracle's is 0."""
    tokens = [float(account["num_tokens"]) + float(account["num_reference_tokens"]) for account in (spent, oracle)]
    pairs = {**{key: (float(spent[key]), float(oracle[key])) for key in COSTS}, "tokens": (tokens[0], tokens[1])}
    return {key: mine / its if its else None for key, (mine, its) in pairs.items()}


def _purge(prepared: Prepared) -> None:
    """Deletes what owners of the request sent, in this run's ledger and in all that it goes on from."""
    run, folder = prepared.run, prepared.folder
    if run.mode != "unlearn" or not run.ledger.purge:
        return
    targets = read_partition(folder / PARTITION).owners(prepared.request.rows)
    for place in (folder, *(older for older, _ in ancestry(prepared.source.run))):
        ledger = Ledger(place)
        if ledger.exists:
            log.info("ledger of %s: %d updates of clients %s purged", place, ledger.purge(targets), sorted(targets))


def _evaluated(prepared: Prepared) -> Request | None:
    """What the forget set is: the request's rows, or where nothing was asked for the forget split."""
    return prepared.request if prepared.request.rows else None


def account(folder: Path) -> Account:
    """Adds up history.jsonl; peak memory is that of this process since the run began in it."""
    history = read_history(folder)
    clients = [client for line in history for client in line["clients"]]  # type: ignore[attr-defined]
    totals = {
        key: sum(int(client[key]) for client in clients)
        for key in ("num_steps", "num_tokens", "num_reference_tokens", "bytes_down", "bytes_down_reference", "bytes_up")
    }
    dropped = (*_refused(folder), *_dropped(history))
    stopped = tuple(
        f"client {client['client_id']} in round {line['round']}: {client['stopped']}"
        for line in history
        for client in line["clients"]  # type: ignore[attr-defined]
        if client["stopped"]
    )
    seconds = sum(float(client["seconds"]) for client in clients)
    peak = peak_memory()
    return Account(
        **totals,
        seconds=seconds,
        peak_memory_mib=peak.resident,
        peak_device_memory_mib=peak.device,
        dropped=dropped,
        stopped=stopped,
    )


def _refused(folder: Path) -> tuple[str, ...]:
    path = folder / ROLL_CALL  # central training has none
    return tuple(json.loads(path.read_text(encoding="utf-8"))["refused"]) if path.is_file() else ()


def _dropped(history: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    rounds: dict[tuple[int, str], list[int]] = {}
    for line in history:
        for client in line["clients"]:
            if client["reason"]:
                rounds.setdefault((client["client_id"], client["reason"]), []).append(line["round"])
    return tuple(
        f"client {client}: {reason} in round{'s' if len(when) > 1 else ''} {', '.join(map(str, when))}"
        for (client, reason), when in sorted(rounds.items())
    )
