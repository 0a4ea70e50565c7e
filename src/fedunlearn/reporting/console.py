"""What a run says on the terminal: its config in short, and its result as a table."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from fedunlearn.files import read_object
from fedunlearn.records.evaluation import EvalLog
from fedunlearn.records.lm_eval import Figure, LmEvalLog
from fedunlearn.reporting.run_folder import DONE

SHORT = (
    "mode", "task_name", "tofu_path", "muse_path", "forget_split", "retain_split", "requests", "retain_logs_path", "model.model_args", "method", "strategy",
    "lm_eval", "aggregation", "robust", "gate", "protocol", "partition.scheme", "launcher", "trainer.federated", "trainer.args",
)  # fmt: skip
SHOWN = (
    "forget_Q_A_Prob",
    "forget_Q_A_ROUGE",
    "forget_truth_ratio",
    "forget_quality",
    "retain_Q_A_Prob",
    "model_utility",
)

SHOWN_OF_MUSE = (
    "forget_verbmem_ROUGE",
    "forget_knowmem_ROUGE",
    "extraction_strength",
    "privleak",
    "retain_knowmem_ROUGE",
)

QUIET = (
    "flwr",
    "transformers",
    "datasets",
    "httpx",
    "huggingface_hub",
    "alembic",
    "filelock",
    "accelerate",
    "absl",
    "lm_eval",
)


def set_logging() -> None:
    """Sends our log lines to stderr and keeps the libraries to warnings."""
    handler = RichHandler(
        console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in QUIET:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers.clear()
        logger.propagate = True


def show_config(plain: Mapping[str, object]) -> None:
    """Prints the effective config in short, one line a group; the whole of it is saved as config.yaml."""
    console = Console(stderr=True, highlight=False)
    for key in SHORT:
        value = _find(plain, key)
        if value is not None:
            console.print(f"[bold]{key}[/bold] {_one_line(value)}", soft_wrap=True)


def _find(tree: Mapping[str, object], key: str) -> object:
    value: object = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _one_line(value: object) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return " ".join(
        f"{k}={_one_line(v) if not isinstance(v, Mapping) else '{' + _one_line(v) + '}'}"
        for k, v in value.items()
        if v is not None
    )


def show_result(folder: Path, log: EvalLog | None) -> None:
    """Prints where the run lies, which clients did not count, and the evaluation's main figures."""
    console = Console(highlight=False)
    console.print(f"result: {folder}", soft_wrap=True)
    _show_account(console, read_object(folder / DONE))
    if log is not None:
        console.print(metric_table({folder.name: figures(log)}))
        if log.provenance.get("trial"):
            console.print(f"a trial on {log.provenance['max_rows']} rows of each data set, no evaluation")


def _show_account(console: Console, done: Mapping[str, Any]) -> None:
    account = done.get("account", {})
    if account:
        console.print(_cost(account, done.get("of_the_oracle", {})), soft_wrap=True)
    for key, said in (("dropped", "did not count"), ("stopped", "ended its epoch early")):
        for sentence in account.get(key, ()):
            console.print(f"{said}: {sentence}", soft_wrap=True, markup=False)


def show_submitted(done: Mapping[str, Any]) -> None:
    """Prints what a server told of a run's result: its folder under the server's saves_root, what it cost, which clients did not count, and the evaluation's main figures."""
    console = Console(highlight=False)
    console.print(f"result: {done['folder']} under the server's saves_root", soft_wrap=True)
    _show_account(console, done["done"])
    if done["metrics"]:
        console.print(metric_table({Path(done["folder"]).name: done["metrics"]}))


def show_evaluations(logs: Mapping[Path, EvalLog]) -> None:
    """Prints where evaluations lie, and their main figures side by side."""
    if len(logs) == 1:
        for folder, log in logs.items():
            show_result(folder, log)
        return
    console = Console(highlight=False)
    for folder in logs:
        console.print(f"result: {folder}", soft_wrap=True)
    console.print(metric_table({folder.name: figures(log) for folder, log in logs.items()}))


def show_lm_eval(logs: Mapping[str, LmEvalLog]) -> None:
    """Prints what the harness found, one column a model: tasks and groups by themselves, with standard errors; parts of a group only stand in the file."""
    console = Console(highlight=False)
    table = Table("lm_eval", "metric", *logs)
    for task, metric in dict.fromkeys((task, metric) for log in logs.values() for task, metric in log.main_figures):
        table.add_row(task, metric, *(_with_error(log.tasks[task].metrics.get(metric)) for log in logs.values()))
    console.print(table)
    limits = {log.provenance["limit"] for log in logs.values() if log.provenance.get("trial")}
    if limits:
        console.print(f"a trial on {', '.join(map(str, limits))} rows of each task, no evaluation")


def _with_error(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "–"
    return _number(figure.value) + ("" if figure.stderr is None else f" ± {_number(figure.stderr)}")


def _cost(account: Mapping[str, float], share: Mapping[str, float | None]) -> str:
    """What a run cost, and in brackets how much that is of the oracle's where it is known."""
    told = {
        "num_steps": f"{account['num_steps']} optimiser steps",
        "tokens": f"{account['num_tokens'] + account['num_reference_tokens']} tokens",
        "seconds": f"{account['seconds']:.1f} s of clients' work",
        "bytes_up": f"{account['bytes_up'] / 1e6:.1f} MB up",
        "bytes_down": f"{account['bytes_down'] / 1e6:.1f} MB down",
        "peak_memory_mib": f"{account['peak_memory_mib']:.0f} MiB at the peak",
    }
    device = account.get("peak_device_memory_mib")
    if device is not None:
        told["peak_device_memory_mib"] = f"{device:.0f} MiB on the device"
    parts = [text + (f" ({share[key]:.0%})" if share.get(key) is not None else "") for key, text in told.items()]
    return "cost" + (", of the oracle's" if share else "") + ": " + ", ".join(parts)


def figures(log: EvalLog) -> dict[str, float | None]:
    """Gives every metric's aggregate by name."""
    return {name: metric.agg_value for name, metric in log.metrics.items()}


def metric_table(columns: Mapping[str, Mapping[str, float | None]], metrics: tuple[str, ...] = ()) -> Table:
    """Gives a table, one row a metric and one column a model; null is shown as a dash. metrics: none: the main ones of the benchmark that they are from."""
    table = Table("metric", *columns)
    of_muse = any(name in values for values in columns.values() for name in SHOWN_OF_MUSE if "mem_" in name)
    for metric in metrics or (SHOWN_OF_MUSE if of_muse else SHOWN):
        table.add_row(metric, *(_number(values.get(metric)) for values in columns.values()))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
