"""TOFU_EVAL.json and TOFU_SUMMARY.json, MUSE_EVAL.json and MUSE_SUMMARY.json: open-unlearning's keys and shapes, so that a log of theirs serves as ours and back.

Ours hold one block more, `provenance`; a log without it is theirs and follows their definitions.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedunlearn.errors import UserError
from fedunlearn.files import write_bytes
from fedunlearn.records.evaluation import OURS, THEIRS, Definition, EvalLog, MetricResult, Row, RowValue

EVAL_FILE, SUMMARY_FILE = "TOFU_EVAL.json", "TOFU_SUMMARY.json"
SUMMARY_METRICS = (
    "exact_memorization", "extraction_strength", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_quality", "mia_gradnorm",
    "mia_loss", "mia_min_k", "mia_min_k_plus_plus", "mia_reference", "mia_zlib", "model_utility", "privleak",
)  # fmt: skip
DEFINITIONS = (OURS, THEIRS)


@dataclass(frozen=True)
class LogFiles:
    """How a benchmark's files are called, and the metrics that its summary holds."""

    evaluation: str
    summary: str
    metrics: tuple[str, ...]


TOFU_FILES = LogFiles(EVAL_FILE, SUMMARY_FILE, SUMMARY_METRICS)
MUSE_FILES = LogFiles(
    "MUSE_EVAL.json",
    "MUSE_SUMMARY.json",
    (
        "exact_memorization", "extraction_strength", "forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "mia_gradnorm", "mia_loss", "mia_min_k",
        "mia_min_k_plus_plus", "mia_reference", "mia_zlib", "privleak", "retain_knowmem_ROUGE",
    ),
)  # fmt: skip
FILES_OF: Mapping[Literal["tofu", "muse"], LogFiles] = {"tofu": TOFU_FILES, "muse": MUSE_FILES}
"""By eval.name."""


def write_log(log: EvalLog, folder: Path, files: LogFiles = TOFU_FILES) -> None:
    """Writes both files into the folder (made where missing), each under a temporary name first and then renamed.

    The summary holds agg_value of the benchmark's metrics that are there and not None; that of a trial says its max_rows too.
    """
    body: dict[str, object] = {name: _metric_json(result) for name, result in log.metrics.items()}
    _replace(folder / files.evaluation, {**body, "provenance": dict(log.provenance)})
    trial = {"max_rows": log.provenance["max_rows"]} if log.provenance.get("trial") else {}
    _replace(folder / files.summary, {**summary(log, files), **trial})


def summary(log: EvalLog, files: LogFiles = TOFU_FILES) -> dict[str, float]:
    """Gives metric -> agg_value for the benchmark's metrics that have one, in name order."""
    found = {name: log.metrics[name].agg_value for name in files.metrics if name in log.metrics}
    return {name: value for name, value in found.items() if value is not None}


def log_file(path: Path, files: LogFiles = TOFU_FILES) -> Path:
    """Gives the file that retain_logs_path stands for: a folder's evaluation, or the path itself."""
    return path / files.evaluation if path.is_dir() else path


def read_log(path: Path, files: LogFiles = TOFU_FILES) -> EvalLog:
    """Reads an evaluation of ours or of open-unlearning; a folder stands for the file in it.

    Raises UserError where there is no such file, where it is no JSON (NaN is none), or no log of an evaluation.
    """
    file = log_file(path, files)
    if not file.is_file():
        raise UserError(
            f"retain_logs_path={str(path)!r}: there is no such file; give the {files.evaluation} of an evaluation of the oracle, or null"
        )
    try:
        content = file.read_bytes()
        log = _parse_log(json.loads(content.decode("utf-8"), parse_constant=_refuse_constant))
        return replace(log, file_hash=hashlib.sha256(content).hexdigest())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"retain_logs_path={str(path)!r} is no {files.evaluation} ({error}); expected JSON with agg_value and value_by_index under each metric's "
            "name: evaluate the oracle again, or set it to null"
        ) from error


def _metric_json(result: MetricResult) -> dict[str, object]:
    body: dict[str, object] = {name: _metric_json(part) for name, part in result.parts.items()}
    if result.parts:
        body["auc"] = result.agg_value
    body["agg_value"] = result.agg_value
    if result.value_by_index:
        body["value_by_index"] = {str(index): dict(row) for index, row in enumerate(result.value_by_index)}
    return body


def _parse_log(body: Mapping[str, object]) -> EvalLog:
    provenance = body.get("provenance", {})
    if not isinstance(provenance, dict):
        raise ValueError("provenance is no JSON object")
    definition = _definition(provenance)
    others = provenance.get("definitions", {})
    metrics = {
        name: _parse_metric(name, value, str(others.get(name, definition)))
        for name, value in body.items()
        if name != "provenance"
    }
    if not metrics:
        raise ValueError("it holds no metric")
    return EvalLog(metrics, provenance)


def _definition(provenance: Mapping[str, object]) -> Definition:
    said = provenance.get("definition", THEIRS)
    for known in DEFINITIONS:
        if said == known:
            return known
    raise ValueError(f"its definition {said!r} is unknown; known: {', '.join(DEFINITIONS)}")


def _parse_metric(name: str, body: object, definition: Definition) -> MetricResult:
    if not isinstance(body, dict) or "agg_value" not in body:
        raise ValueError(f"{name} has no agg_value")
    rows = body.get("value_by_index", {})
    if list(rows) != [str(index) for index in range(len(rows))]:
        raise ValueError(f"the rows of {name} are not numbered 0 .. {len(rows) - 1}")
    parts = {
        key: _parse_metric(f"{name}.{key}", value, definition)
        for key, value in body.items()
        if isinstance(value, dict) and key != "value_by_index"
    }
    value = body["agg_value"]
    return MetricResult(
        None if value is None else _number(value),
        definition,
        tuple(_parse_row(name, row) for row in rows.values()),
        parts,
    )


def _parse_row(name: str, row: object) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{name} has a row that is no JSON object")
    return {key: _parse_value(value) for key, value in row.items()}


def _parse_value(value: object) -> RowValue:
    if isinstance(value, list):
        return tuple(_number(item) for item in value)
    return value if isinstance(value, str) else _number(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{str(value)[:100]!r} stands where a number is wanted")
    return float(value)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"it holds {name}")


def _replace(path: Path, body: object) -> None:
    text = json.dumps(body, indent=4, ensure_ascii=False, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())
