"""Evaluation of a base, an adapter or a run of ours; or of several, which share one base."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fedunlearn.config.parallel import parallel_args
from fedunlearn.config.run import EvalRun
from fedunlearn.data.requests import evaluated_request
from fedunlearn.doors.compose import ComposedConfig, changed, model_from
from fedunlearn.doors.measure import evaluate, general_ability, reference_scores
from fedunlearn.doors.prepare import check_evaluation, find_inputs, load_model, tried
from fedunlearn.doors.split_evaluation import split_evaluation
from fedunlearn.errors import UserError
from fedunlearn.evals.files import FILES_OF, write_log
from fedunlearn.evals.lm_eval import load_tasks
from fedunlearn.evals.lm_eval_file import write_lm_eval
from fedunlearn.federation.site import set_threads
from fedunlearn.files import write_json
from fedunlearn.models.adapter_files import load_adapter, saved_hash
from fedunlearn.models.source import adapter_folder
from fedunlearn.records.evaluation import EvalLog
from fedunlearn.reporting.run_folder import DONE, check_folders, config_hash, make_folder, provenance, run_path
from fedunlearn.reporting.run_lock import run_lock

log = logging.getLogger(__name__)


def run_evaluations(composed: ComposedConfig) -> dict[Path, EvalLog]:
    """Evaluates what the model names, or each of `adapters`, as `<task_name>.1`, `<task_name>.2` ...; gives the logs by their folders.

    The folders of all are judged before the first begins. Adapters of one LoRA shape share one base, loaded once.
    """
    run = composed.run
    adapters = run.adapters if isinstance(run, EvalRun) else None
    if adapters is None:
        return {run_path(run): run_evaluation(composed)}
    legs = [
        changed(
            composed,
            {"task_name": f"{run.task_name}.{number}", "adapters": None, "model": model_from(composed.plain, path)},
        )
        for number, path in enumerate(adapters, 1)
    ]
    check_folders((leg.run, leg.plain) for leg in legs)
    _check_adapters(adapters)
    found = {}
    for path, leg in zip(adapters, legs, strict=True):
        log.info("%s: %s", path, run_path(leg.run))
        found[run_path(leg.run)] = run_evaluation(leg)
    return found


def _check_adapters(adapters: Sequence[str]) -> None:
    """Raises UserError, all faults at once, for a path that is not there, weights that are damaged, and an adapter that is named twice in other words."""
    faults: list[str] = []
    places: dict[Path, str] = {}
    for number, path in enumerate(adapters):
        key = f"adapters[{number}]"
        place = tried(faults, partial(_whole, Path(path).expanduser(), key))
        if place is not None and places.setdefault(place, path) != path:
            faults.append(f"{key}={path!r} is {places[place]!r} over again: give each once")
    if faults:
        raise UserError(*faults)


def _whole(path: Path, key: str) -> Path:
    """Gives the folder of an adapter whose weights can be read, or of a full model. Raises UserError for any other path."""
    folder = adapter_folder(path, key)
    if folder is not None:
        load_adapter(folder)
    return (folder or path).resolve()


def run_evaluation(composed: ComposedConfig) -> EvalLog:
    """Evaluates a base, an adapter or a run of ours into saves/eval/<task_name>/; where lm_eval asks for it, its general ability too."""
    run = composed.run
    if not isinstance(run, EvalRun):
        raise UserError(f"mode={run.mode!r} is no evaluation: give --config-name=eval.yaml, or use src/fed_train.py")
    if run.resume:
        raise UserError("resume=true: an evaluation is one piece; leave it out, or use overwrite=true")
    with run_lock(run_path(run)):
        return _evaluation(composed, run)


def _evaluation(composed: ComposedConfig, run: EvalRun) -> EvalLog:
    set_threads(run)
    inputs = find_inputs(run, composed.plain)
    request = evaluated_request(run, inputs.source.run, inputs.data)
    check_evaluation(run, inputs.data, request, inputs.retain_log)
    loaded = None if run.lm_eval is None else load_tasks(run.lm_eval)
    reference = reference_scores(run, inputs.data, request)
    load, sha = partial(load_model, run, inputs.source), config_hash(composed.plain)
    general = None
    if parallel_args(run.parallel).kind == "tp":
        found = split_evaluation(run, composed.plain, load, sha)
    else:
        made = load()
        found = evaluate(run, made, made.start, inputs.data, inputs.retain_log, sha, request, reference)
        general = None if loaded is None else general_ability(run, made, sha, loaded)
    adapter_hash = str(found.provenance["adapter_hash"] or "none")
    hashes = {
        "base": str(found.provenance["base_fingerprint"]),
        "adapter": adapter_hash,
        "source": saved_hash(inputs.source.adapter),
        "data": inputs.data.hash("full"),
    }

    def fill(place: Path) -> None:
        write_json(place / "provenance.json", {**provenance(run, hashes), "config_hash": sha})
        write_log(found, place, FILES_OF[run.eval.name])
        if general is not None:
            write_lm_eval(general, place)
        write_json(place / DONE, {"adapter_hash": adapter_hash})

    make_folder(run, composed.plain, composed.text, fill)
    return found
