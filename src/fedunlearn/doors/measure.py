"""What a model is worth, for whoever has one in place: its evaluation, and that of the model it is compared with."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.data.benchmark import Benchmark
from fedunlearn.doors.prepare import at_model, load_model
from fedunlearn.evals.evaluation import ReferenceScores, evaluate_suite
from fedunlearn.evals.evidence import Passes
from fedunlearn.evals.lm_eval import LoadedTasks, evaluate_tasks
from fedunlearn.evals.store import EvalStore
from fedunlearn.evals.suites import read_suite
from fedunlearn.evals.tables import parts_of
from fedunlearn.files import canonical_json
from fedunlearn.metrics.base import Part, readings_of
from fedunlearn.models.resident import Resident, numbers_name
from fedunlearn.models.source import resolve_source
from fedunlearn.records.adapter import Adapter, Weights
from fedunlearn.records.evaluation import Compat, EvalLog
from fedunlearn.records.lm_eval import LmEvalLog
from fedunlearn.records.requests import Request
from fedunlearn.reporting.run_folder import PACKAGES, versions


def evaluate(
    run: TrainRun | EvalRun,
    made: Resident,
    adapter: Adapter | None,
    data: Benchmark,
    retain_log: EvalLog | None,
    config_sha: str,
    request: Request | None,
    reference: ReferenceScores | None = None,
) -> EvalLog:
    """Evaluates the model as it is now; the result's provenance names base, adapter, dtype, versions and config."""
    return evaluate_suite(
        made.model,
        made.chat,
        read_suite(data, run.forget_split, run.eval, request),
        run.eval,
        retain_log,
        known_of(run, made, adapter, config_sha),
        store_of(made, adapter, Path(run.paths.cache_dir), run.eval.compat),
        reference,
    )


def general_ability(run: EvalRun, made: Resident, config_sha: str, loaded: LoadedTasks) -> LmEvalLog:
    """Asks the model, as it is now, what lm_eval names. Its provenance is that of the evaluation beside it, and the harness's version and settings."""
    if run.lm_eval is None:
        raise ValueError("tasks were read that nobody asked for")
    known = known_of(run, made, made.start, config_sha, (*PACKAGES, "lm_eval"))
    return evaluate_tasks(made.model, made.chat, loaded, run.lm_eval, known)


def known_of(
    run: TrainRun | EvalRun,
    made: Resident,
    adapter: Adapter | None,
    config_sha: str,
    packages: Sequence[str] = PACKAGES,
) -> Mapping[str, object]:
    """Gives what an evaluation's provenance says of the model."""
    return {
        "base": made.base_name,
        "base_fingerprint": made.fingerprint,
        "adapter_hash": adapter.tensor_hash if adapter is not None else None,
        "dtype": run.model.model_args.torch_dtype,
        "quantization": made.quantization,
        "versions": versions(packages),
        "config_hash": config_sha,
    }


def store_of(made: Resident, adapter: Adapter | None, cache: Path, compat: Compat) -> EvalStore:
    """Gives the place where what this model says is kept: named by all that its numbers and texts depend on."""
    weights = Weights({}) if adapter is None else adapter.weights
    generation = made.model.generation_config
    said = [
        numbers_name(made, weights, False),
        compat,
        made.chat.provenance,
        None if generation is None else generation.to_dict(),
    ]
    return EvalStore(cache / "evaluations" / hashlib.sha256(canonical_json(said).encode()).hexdigest())


def reference_scores(run: TrainRun | EvalRun, data: Benchmark, request: Request | None) -> ReferenceScores | None:
    """Gives plain answers under the model of eval.reference_model_path, by data set; None where it is null.

    It becomes the process's model: whoever needs another loads it afterwards.
    """
    if run.eval.reference_model_path is None:
        return None
    other = at_model(run, run.eval.reference_model_path)
    made = load_model(other, resolve_source(other.model.model_args, Path(run.paths.pocket_dir)))
    passes = Passes(
        made.model, made.chat, run.eval, store_of(made, made.start, Path(run.paths.cache_dir), run.eval.compat)
    )
    sets = read_suite(data, run.forget_split, run.eval, request).sets
    found = {}
    for name, parts in parts_of(readings_of(run.eval.metrics)).items():
        if Part.REFERENCE in parts:
            found[name] = passes.table(sets[name].encode(made.chat), frozenset({Part.PLAIN}), ()).plain
    return found
