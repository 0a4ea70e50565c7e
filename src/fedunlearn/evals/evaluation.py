"""A whole evaluation: every different answer scored once, every question answered once, all metrics from these passes."""

from collections.abc import Mapping

from torch import nn

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.data.chat import ChatFormat
from fedunlearn.evals.dataset import Sets
from fedunlearn.evals.evidence import Passes
from fedunlearn.evals.store import EvalStore
from fedunlearn.evals.suites import Suite
from fedunlearn.evals.tables import parts_of
from fedunlearn.metrics.base import Evidence, Metric, Part, compute_metrics, readings_of
from fedunlearn.records.evaluation import AnswerScore, Compat, EvalLog, MetricResult, definition_of

ReferenceScores = Mapping[str, tuple[AnswerScore, ...]]


def evaluate_suite(
    model: nn.Module,
    chat: ChatFormat,
    suite: Suite,
    settings: EvalConfig,
    retain_log: EvalLog | None,
    provenance: Mapping[str, object],
    store: EvalStore | None = None,
    reference: ReferenceScores | None = None,
) -> EvalLog:
    """Evaluates a model, base or PEFT, by settings.metrics on the data sets that these read.

    retain_log: the evaluation of the oracle (None: what reads it is null). provenance: what the caller knows of the
    model (base, hashes, dtype, versions); split, definitions, template, the hashes of data and of the retain log's file are added here, and `trial` with
    `max_rows` where settings.max_rows cuts the data sets short. store: where what the model said is kept. reference: by data set, plain answers under the reference model.
    Raises UserError for a retain log of other rows or definitions (before the model is asked), a row that does not fit
    max_length, and a loss that is not finite. The model's mode and the global random state stay.
    """
    suite.check(retain_log, settings, chat.max_length)
    passes = Passes(model, chat, settings, store or EvalStore(None))
    found = evaluate_sets(passes, suite.sets, retain_log, reference or {})
    return EvalLog(found, {**provenance, **_provenance(suite, chat, settings, retain_log)})


def evaluate_sets(
    passes: Passes, sets: Sets, retain_log: EvalLog | None, reference: ReferenceScores
) -> dict[str, MetricResult]:
    """Runs the passes that the metrics need over these data sets, and gives every metric by name."""
    tables, texts, settings = {}, {}, passes.settings
    for name, parts in parts_of(readings_of(settings.metrics)).items():
        encoded = sets[name].encode(passes.chat)
        tables[name] = passes.table(encoded, parts, reference.get(name, ()))
        if Part.TEXTS in parts:
            texts[name] = passes.texts(encoded)
    evidence = Evidence(tables=tables, texts=texts, retain=retain_log, compat=settings.compat)
    return compute_metrics(settings.metrics, evidence)


def _provenance(suite: Suite, chat: ChatFormat, settings: EvalConfig, retain_log: EvalLog | None) -> dict[str, object]:
    said: dict[str, object] = {
        "forget_split": suite.forget.name,
        "definition": definition_of(settings.compat),
        "definitions": other_definitions(settings.metrics, settings.compat),
        "question_key": settings.question_key,
        "gradnorm_of": settings.gradnorm_of,
        "template": dict(chat.provenance),
        "data": {data.split: data.hash for data in suite.sets.values()},
        "retain_log": None if retain_log is None else retain_log.file_hash,
    }
    if suite.cuts:
        said["max_length"] = chat.max_length
    lacking = {name: data.lacking for name, data in suite.sets.items() if data.lacking}
    if lacking:
        said["null_because"] = lacking
    if settings.max_rows is not None:
        said |= {"trial": True, "max_rows": settings.max_rows}
    return said


def other_definitions(metrics: Mapping[str, Metric], compat: Compat) -> dict[str, str]:
    """Gives the definition of each metric that has another than the evaluation as a whole."""
    named = {name: metric.definition(compat) for name, metric in sorted(metrics.items())}
    return {name: definition for name, definition in named.items() if definition != definition_of(compat)}
