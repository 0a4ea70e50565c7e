"""General ability by lm-evaluation-harness (an extra of its own), asked of a model of this process as it stands.

Its HFLM is wrapped around our model: no second base, no merge. Prompts are the harness's plain text; log-probabilities are float32.
"""

import copy
import functools
import hashlib
import importlib
import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedunlearn.config.lm_eval import LmEvalConfig
from fedunlearn.data.chat import ChatFormat
from fedunlearn.errors import UserError, did_you_mean
from fedunlearn.evals.inference import inference
from fedunlearn.files import canonical_json
from fedunlearn.records.lm_eval import Figure, LmEvalLog, TaskFigures

log = logging.getLogger(__name__)
MODULES = ("lm_eval", "lm_eval.tasks", "lm_eval.evaluator", "lm_eval.models.huggingface")
PYTHON_SEED, SEED = 0, 1234
"""The harness's own defaults, before its tasks are read and before they are asked."""
RESAMPLES = 1000
"""Of standard errors that have no closed form."""
NO_METRICS = ("name", "alias", "sample_len", "sample_count")

LoadedTasks = Mapping[str, Any]
"""The harness's TaskDict: `tasks` and `groups` by name."""


def load_tasks(settings: LmEvalConfig) -> LoadedTasks:
    """Reads the tasks and their rows; no model is needed.

    Raises UserError where the harness is missing, include_path holds no YAML, a task is unknown or cannot be read, or would leave something of the settings aside.
    """
    if settings.include_path is not None and not any(Path(settings.include_path).glob("**/*.yaml")):
        raise UserError(
            f"lm_eval.include_path={settings.include_path!r} is no folder with a .yaml in it: name the folder of your tasks, or null"
        )
    with _own_draws():
        for name in MODULES:
            _import(name)
        manager = _manager(settings.include_path)
        unknown = [_unknown(name, manager.all_tasks) for name in settings.tasks if name not in manager.all_tasks]
        if unknown:
            raise UserError(*unknown)
        loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
        for name in settings.tasks:
            found = _loaded(manager, name)
            for kind, members in loaded.items():
                members.update(found.get(kind, {}))
        faults = [fault for name, task in loaded["tasks"].items() for fault in _faults(name, task, settings)]
        if faults:
            raise UserError(*faults)
        for name, task in loaded["tasks"].items():
            _set_examples(name, task, settings.num_fewshot)
        _check_used(manager, settings, loaded)
    return loaded


def evaluate_tasks(
    model: nn.Module, chat: ChatFormat, loaded: LoadedTasks, settings: LmEvalConfig, known: Mapping[str, object]
) -> LmEvalLog:
    """Asks the model. known: what the provenance says of it.

    Model, tokenizer and the global random state are afterwards as they were.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    # its bars and remarks go to stderr: stdout is for results
    with inference(model), _own_draws(), redirect_stdout(sys.stderr), _one_process():
        with _quiet("lm_eval.models.huggingface"):
            asked = HFLM(
                pretrained=model,
                backend="causal",
                tokenizer=copy.deepcopy(chat.tokenizer),  # it gets a pad token
                batch_size=settings.batch_size,
                softmax_dtype="float32",
            )
        found = evaluate(
            lm=asked,
            task_dict=dict(loaded),
            limit=settings.limit,
            bootstrap_iters=RESAMPLES,
            log_samples=True,
        )
        max_length = int(asked.max_length)
    provenance = {
        **known,
        "limit": settings.limit,
        "trial": settings.limit is not None,
        "batch_size": settings.batch_size,
        "max_length": max_length,
    }
    return LmEvalLog(_figures(found), provenance)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"lm_eval needs lm-evaluation-harness ({error}): pip install 'fedunlearn[lm-eval]', or leave lm_eval out"
        ) from error


@functools.cache
def _manager(include_path: str | None) -> Any:
    """The index of all tasks; it takes seconds, and several adapters read it once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _unknown(name: str, known: list[str]) -> str:
    near = did_you_mean(name, known) or "."
    return (
        f"lm_eval.tasks: {name!r} is unknown{near} The harness has {len(known)} tasks, groups and tags (lm-eval ls tasks lists them); "
        "your own need lm_eval.include_path, and YAMLs that can be read"
    )


def _loaded(manager: Any, name: str) -> Mapping[str, Mapping[str, Any]]:
    try:
        found: Mapping[str, Mapping[str, Any]] = manager.load([name])
    except Exception as error:  # whatever a task's YAML, its code, or its data set's host run into
        raise UserError(
            f"lm_eval.tasks: {name!r} cannot be read ({type(error).__name__}: {error}): its data must be on this machine or to be fetched "
            "(HF_HUB_OFFLINE=0); correct the task, or take it out"
        ) from error
    return found


def _faults(name: str, task: Any, settings: LmEvalConfig) -> Iterator[str]:
    fixed = task.get_config("num_fewshot")
    if fixed == 0 and settings.num_fewshot:
        yield f"lm_eval.num_fewshot={settings.num_fewshot}, but {name!r} is defined without examples: leave it null, or take the task out"
    if getattr(task, "UNSAFE_CODE", False):
        yield f"lm_eval.tasks: {name!r} would run code that the model wrote, which is not done here: take it out"
    if getattr(task, "MULTIMODAL", False):
        yield f"lm_eval.tasks: {name!r} asks about images, which a language model cannot see: take it out"


def _check_used(manager: Any, settings: LmEvalConfig, loaded: LoadedTasks) -> None:
    if settings.include_path is None:
        return
    found = (manager.task_index.get(name) for name in (*settings.tasks, *loaded["tasks"]))
    files = [Path(one.yaml_path) for one in found if one is not None and one.yaml_path]
    if not any(file.is_relative_to(settings.include_path) for file in files):
        log.warning("lm_eval.include_path=%s: none of lm_eval.tasks comes from there", settings.include_path)


def _set_examples(name: str, task: Any, num_fewshot: int | None) -> None:
    """Says how many examples precede each question, and makes the first question to see that there are as many."""
    wanted = (task.get_config("num_fewshot") if num_fewshot is None else num_fewshot) or 0
    task.set_config(key="num_fewshot", value=wanted)
    task.set_fewshot_seed(seed=SEED)
    try:
        task.build_all_requests(limit=1, rank=0, world_size=1)
    except Exception as error:  # whatever a template or a sampler runs into
        raise UserError(
            f"lm_eval.tasks: {name!r} cannot be asked with {wanted} examples before the question ({type(error).__name__}: {error}): "
            "set lm_eval.num_fewshot lower, or correct the task"
        ) from error
    task.set_fewshot_seed(seed=SEED)


@contextmanager
def _own_draws() -> Iterator[None]:
    """Seeds the global generators as the harness does, and gives them back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(PYTHON_SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _one_process() -> Iterator[None]:
    """Lets the harness draw its resamples here: a fork of a process that holds a model is no place for it."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a logger to errors: that HFLM was handed a model is what we want."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _figures(found: Mapping[str, Any]) -> dict[str, TaskFigures]:
    """Tasks first, then groups that have figures of their own."""
    parent = {part: group for group, parts in found["group_subtasks"].items() for part in parts}
    bodies = {**found["results"], **found.get("groups", {})}
    metrics = {name: _metrics(name, body) for name, body in bodies.items()}
    return {
        name: TaskFigures(
            metrics=metrics[name],
            num_rows=int(body["sample_len"]),
            num_fewshot=found["n-shot"].get(name),
            version=_version(found["versions"].get(name)),
            rows_hash=_rows_hash(found["samples"][name]) if name in found["samples"] else None,
            part_of=parent.get(name) if metrics.get(parent.get(name, "")) else None,
        )
        for name, body in bodies.items()
        if metrics[name]
    }


def _metrics(name: str, body: Mapping[str, Any]) -> dict[str, Figure]:
    found = {}
    for key, value in body.items():
        metric, _, way = key.partition(",")
        if key in NO_METRICS or metric.endswith("_stderr"):
            continue
        shown = metric if way in ("", "none") else key
        number, error = _number(value), _number(body.get(f"{metric}_stderr,{way}"))
        if number is None:
            log.warning("lm_eval: %s of %s is %r, no finite number: it is null in the file", shown, name, value)
        found[shown] = Figure(number, error)
    return found


def _number(value: object) -> float | None:
    if not isinstance(value, int | float | np.integer | np.floating):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _version(said: object) -> str | float | None:
    return said if said is None or isinstance(said, str) else _number(said)


def _rows_hash(samples: list[Mapping[str, Any]]) -> str:
    keys = ("doc_id", "doc_hash", "prompt_hash", "target_hash")
    return hashlib.sha256(canonical_json([[row[key] for key in keys] for row in samples]).encode()).hexdigest()
