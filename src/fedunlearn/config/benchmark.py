"""Which benchmark a run is on, and what goes with it."""

from typing import Literal

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.config.requests import RequestConfig
from fedunlearn.methods.base import Method, Unlearner
from fedunlearn.metrics.base import Part, readings_of
from fedunlearn.protocols.base import Protocol

Rule = tuple[bool, str]


def benchmark_rules(
    tofu_path: str | None, muse_path: str | None, settings: EvalConfig, requests: tuple[RequestConfig, ...] | None
) -> list[Rule]:
    """Rules of every run: one data set, evaluated as what it is."""
    if (tofu_path is None) == (muse_path is None):
        said = f"tofu_path={tofu_path!r} beside muse_path={muse_path!r}"
        return [(False, f"{said}: a run is on one benchmark; name one, and set the other to null")]
    name: Literal["tofu", "muse"] = "tofu" if muse_path is None else "muse"
    rules = [
        (
            settings.name == name,
            f"eval.name={settings.name!r} beside {name}_path={muse_path or tofu_path!r}: the evaluation must be that of the data; choose eval={name}",
        )
    ]
    rules += _unread_rules(settings)
    if name == "tofu":
        return [*rules, _holdout_rule(settings)]
    return [
        *rules,
        (
            requests is None,
            "requests are given beside muse_path: MUSE's questions and passages are about the whole of raw/forget, and say nothing of single articles; leave requests null",
        ),
        (
            settings.question_key == "question",
            f"eval.question_key={settings.question_key!r} beside muse_path: MUSE asks every question in one way; leave it at question",
        ),
        (
            settings.holdout_split is None,
            f"eval.holdout_split={settings.holdout_split!r} beside muse_path: MUSE's attacks compare with privleak/holdout; leave it null",
        ),
    ]


def _unread_rules(settings: EvalConfig) -> list[Rule]:
    """What is set and no metric reads; of the whole evaluation, for a round's has fewer metrics."""
    parts = {reading.part for reading in readings_of(settings.metrics)}
    return [
        (
            settings.reference_model_path is None or Part.REFERENCE in parts,
            f"eval.reference_model_path={settings.reference_model_path!r}, but no metric compares with it: leave it null, or choose eval=tofu_reference",
        ),
        (
            settings.gradnorm_of == EvalConfig.gradnorm_of or Part.GRADNORM in parts,
            f"eval.gradnorm_of={settings.gradnorm_of}, but no metric takes gradients: leave it at {EvalConfig.gradnorm_of}, or add mia_gradnorm (eval=tofu_attacks has it)",
        ),
    ]


def _holdout_rule(settings: EvalConfig) -> Rule:
    return (
        settings.holdout_split is None or any(one.dataset == "holdout" for one in readings_of(settings.metrics)),
        f"eval.holdout_split={settings.holdout_split!r}, but no metric reads the holdout: leave it null, or choose eval=tofu_attacks",
    )


def raw_text_rules(
    muse_path: str | None, method: Unlearner | None, local: Method | None, protocol: Protocol
) -> list[Rule]:
    """Rules of a run that trains: what wants questions and answers is not defined over raw text."""
    if muse_path is None:
        return []
    return [
        (
            local is None or local.alternates == "none",
            f"method {type(method).__name__} beside muse_path: it needs other answers to the questions that are forgotten, and MUSE's raw text asks none; "
            "choose another method, such as npo, simnpo or grad_diff",
        ),
        (
            not protocol.releases,
            f"protocol {type(protocol).__name__} beside muse_path: it shows questions and answers to other clients, and MUSE's raw text has none; choose in_round, "
            "target_then_repair or owners_only",
        ),
    ]
