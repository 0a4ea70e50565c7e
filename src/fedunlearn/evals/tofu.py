"""The TOFU evaluation, for whoever has a TOFU in hand."""

from collections.abc import Mapping

from torch import nn

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.data.chat import ChatFormat
from fedunlearn.data.tofu import Tofu
from fedunlearn.evals.evaluation import ReferenceScores, evaluate_suite
from fedunlearn.evals.store import EvalStore
from fedunlearn.evals.suites import read_suite
from fedunlearn.records.evaluation import EvalLog
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
    store: EvalStore | None = None,
    reference: ReferenceScores | None = None,
) -> EvalLog:
    """See evaluate_suite. request: what was forgotten, where that is not the split. Raises UserError for a split or column that is missing too."""
    suite = read_suite(tofu, forget_split, settings, request)
    return evaluate_suite(model, chat, suite, settings, retain_log, provenance, store, reference)
