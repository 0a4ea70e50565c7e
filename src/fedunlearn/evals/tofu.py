"""The TOFU evaluation: every different answer scored once, every question answered once, all metrics from these two passes."""

from collections.abc import Iterator, Mapping

from torch import nn

from fedunlearn.config.data import EvalConfig
from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.data.tofu import PerturbedRow, Tofu
from fedunlearn.evals.generation import clean, decode, generate_texts
from fedunlearn.evals.retain_log import check_retain_log
from fedunlearn.evals.scoring import score_rows
from fedunlearn.evals.sets import Sets, read_sets
from fedunlearn.metrics.tofu import FORGET_TRUTH_RATIO, tofu_metrics
from fedunlearn.records.evaluation import AnswerScore, Detail, EvalLog, Generations, ScoreTable, definition_of
from fedunlearn.records.requests import Request


def evaluate_tofu(
    model: nn.Module,
    chat: ChatFormat,
    tofu: Tofu,
    forget_split: str,
    settings: EvalConfig,
    retain_log: EvalLog | None,
    provenance: Mapping[str, object],
    request: Request | None = None,
) -> EvalLog:
    """Evaluates a model, base or PEFT, on forget rows, retain rows, real authors and world facts of TOFU.

    request: what was forgotten, where that is not the split. retain_log: the evaluation of the oracle, for forget_quality (None: that is null). provenance: what the caller knows of the
    model (base, hashes, dtype, versions); split, definition, template, the hashes of data and of the retain log's file are added here, and `trial` with
    `max_rows` where settings.max_rows cuts the data sets short.
    Raises UserError for a retain log of other rows or definitions (before the model is asked), a row that does not fit
    max_length, a split or column that is missing, and a loss that is not finite. The model's mode and the global random state stay.
    """
    sets = read_sets(tofu, forget_split, settings.max_rows, request)
    if retain_log is not None:
        check_retain_log(retain_log, sets["forget"], settings)
    tables = score_sets(model, chat, sets, settings)
    texts = generate_sets(model, chat, sets, settings)
    retain_ratio = None if retain_log is None else retain_log.metrics[FORGET_TRUTH_RATIO]
    own: dict[str, object] = {
        "forget_split": sets["forget"].name,
        "definition": definition_of(settings.compat),
        "template": dict(chat.provenance),
        "data": {data.split: data.hash for data in sets.values()},
        "retain_log": None if retain_log is None else retain_log.file_hash,
    }
    lacking = {name: data.lacking for name, data in sets.items() if data.lacking}
    if lacking:
        own["null_because"] = lacking
    if settings.max_rows is not None:
        own |= {"trial": True, "max_rows": settings.max_rows}
    return EvalLog(tofu_metrics(tables, texts, retain_ratio, compat=settings.compat), {**provenance, **own})


def score_sets(model: nn.Module, chat: ChatFormat, sets: Sets, settings: EvalConfig) -> dict[str, ScoreTable]:
    """Gives a table a data set; all sets go through one scoring pass, so that an answer that stands in two is scored once."""
    flat = [
        answer
        for data in sets.values()
        for i, row in enumerate(data.rows)
        for answer in _encode(chat, row, f"{data.split} row {i}")
    ]
    wanted = dict.fromkeys(flat, Detail.LOSS)
    found = score_rows(model, wanted, pad_id=chat.pad_id, batch_tokens=settings.batch_tokens, compat=settings.compat)
    scores = iter([found[row] for row in flat])
    return {name: _table(data.rows, scores) for name, data in sets.items()}


def generate_sets(model: nn.Module, chat: ChatFormat, sets: Sets, settings: EvalConfig) -> dict[str, Generations]:
    """Gives prompts, answers and generations a data set, in one generation pass."""
    found = generate_texts(
        model,
        chat,
        [chat.prompt(row.question) for data in sets.values() for row in data.rows],
        batch_size=settings.generation_batch_size,
        max_new_tokens=settings.max_new_tokens,
        compat=settings.compat,
    )
    texts = iter(found)
    return {
        name: Generations(
            inputs=tuple(decode(chat, chat.prompt(row.question)) for row in data.rows),
            ground_truths=tuple(clean(row.answer).strip() for row in data.rows),
            generations=tuple(next(texts) for _ in data.rows),
        )
        for name, data in sets.items()
    }


def _encode(chat: ChatFormat, row: PerturbedRow, where: str) -> list[EncodedRow]:
    """The row's answers in the order in which _table takes their scores back: plain, paraphrased if any, perturbed."""
    paraphrased = [] if row.paraphrased_answer is None else [row.paraphrased_answer]
    return [chat.encode(row.question, answer, where) for answer in (row.answer, *paraphrased, *row.perturbed_answers)]


def _table(rows: tuple[PerturbedRow, ...], scores: Iterator[AnswerScore]) -> ScoreTable:
    plain, paraphrased, perturbed = [], [], []
    for row in rows:
        plain.append(next(scores))
        paraphrased += [] if row.paraphrased_answer is None else [next(scores)]
        perturbed.append(tuple(next(scores) for _ in row.perturbed_answers))
    return ScoreTable(tuple(plain), tuple(perturbed), tuple(paraphrased))
