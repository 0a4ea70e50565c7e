"""LM_EVAL.json, written and read."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedunlearn.files import write_json
from fedunlearn.records.lm_eval import Figure, LmEvalLog, TaskFigures

LM_EVAL_FILE = "LM_EVAL.json"


def write_lm_eval(found: LmEvalLog, folder: Path) -> None:
    """Writes task -> metrics (value and stderr), rows, version; and `provenance`. NaN cannot be written."""
    write_json(folder / LM_EVAL_FILE, asdict(found))


def read_lm_eval(folder: Path) -> LmEvalLog | None:
    """Reads the file of an evaluation's folder; None where the harness was not asked."""
    path = folder / LM_EVAL_FILE
    if not path.is_file():
        return None
    body = json.loads(path.read_text(encoding="utf-8"))
    return LmEvalLog({name: _task(task) for name, task in body["tasks"].items()}, body["provenance"])


def _task(body: Mapping[str, Any]) -> TaskFigures:
    metrics = {name: Figure(**figure) for name, figure in body["metrics"].items()}
    return TaskFigures(**{**body, "metrics": metrics})
