"""The end of a run: the adapter with its proof, the account of what it cost, the evaluation."""

import json
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.data.tofu import Tofu
from fedunlearn.doors.prepare import Prepared, load_model
from fedunlearn.evals.files import write_log
from fedunlearn.evals.tofu import evaluate_tofu
from fedunlearn.federation.checkpoint import read_history
from fedunlearn.federation.rounds import ROLL_CALL
from fedunlearn.files import write_json
from fedunlearn.models.adapter_files import save_adapter
from fedunlearn.models.export import export
from fedunlearn.models.resident import Resident, take_probe
from fedunlearn.records.adapter import Adapter
from fedunlearn.records.evaluation import EvalLog
from fedunlearn.reporting.run_folder import DONE, PACKAGES, versions

RESULT = "adapter"


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a run cost: optimiser steps and input tokens of all clients, bytes by direction, peak resident memory of this process.

    dropped: a sentence for each client whose updates did not all count, and for each that the roll call refused.
    """

    num_steps: int
    num_tokens: int
    bytes_down: int
    bytes_down_reference: int
    bytes_up: int
    peak_memory_mib: float
    dropped: tuple[str, ...] = ()


def finish(prepared: Prepared, result: Adapter, config_sha: str) -> EvalLog | None:
    """Saves the result as <folder>/adapter, evaluates it where eval.at_end says so, and marks the run as done.

    A side-car is exported with it, as aggregation.export_rank says; what is evaluated is what is saved.
    """
    made = load_model(prepared.run, prepared.source)
    adapter, stacked = export(result, prepared.run.aggregation.export_rank)
    made.put(result if stacked else adapter)
    save_adapter(prepared.folder / RESULT, adapter, take_probe(made), stacked)
    log = None
    if prepared.run.eval.at_end:
        log = evaluate(prepared.run, made, adapter, prepared.tofu, prepared.retain_log, config_sha)
        write_log(log, prepared.folder)
    write_json(
        prepared.folder / DONE, {"adapter_hash": adapter.tensor_hash, "account": asdict(account(prepared.folder))}
    )
    return log


def evaluate(
    run: TrainRun | EvalRun,
    made: Resident,
    adapter: Adapter | None,
    tofu: Tofu,
    retain_log: EvalLog | None,
    config_sha: str,
) -> EvalLog:
    """Evaluates the model as it is now; the result's provenance names base, adapter, dtype, versions and config."""
    args = run.model.model_args
    known: Mapping[str, object] = {
        "base": made.base_name,
        "base_fingerprint": made.fingerprint,
        "adapter_hash": adapter.tensor_hash if adapter is not None else None,
        "dtype": args.torch_dtype,
        "versions": versions(PACKAGES),
        "config_hash": config_sha,
    }
    return evaluate_tofu(made.model, made.chat, tofu, run.forget_split, run.eval, retain_log, known)


def account(folder: Path) -> Account:
    """Adds up history.jsonl; peak memory is that of this process so far."""
    history = read_history(folder)
    clients = [client for line in history for client in line["clients"]]  # type: ignore[attr-defined]
    totals = {
        key: sum(int(client[key]) for client in clients)
        for key in ("num_steps", "num_tokens", "bytes_down", "bytes_down_reference", "bytes_up")
    }
    dropped = (*_refused(folder), *_dropped(history))
    return Account(**totals, peak_memory_mib=peak_memory_mib(), dropped=dropped)


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


def peak_memory_mib() -> float:
    """Peak resident memory of this process in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024.0 * 1024.0 if sys.platform == "darwin" else 1024.0)
