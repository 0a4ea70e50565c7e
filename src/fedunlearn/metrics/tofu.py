"""All base metrics of a TOFU evaluation, from score tables and texts alone."""

from collections.abc import Mapping

from fedunlearn.metrics.forget_quality import forget_quality
from fedunlearn.metrics.model_utility import model_utility
from fedunlearn.metrics.probability import answer_probability, normalised_probability, perturbed_probability
from fedunlearn.metrics.rouge import rouge
from fedunlearn.metrics.truth_ratio import truth_ratio
from fedunlearn.records.evaluation import Compat, Generations, MetricResult, ScoreTable, definition_of

FORGET_TRUTH_RATIO = "forget_truth_ratio"


def _compared(name: str) -> tuple[str, ...]:
    """The metrics of forget or retain rows that read wrong or paraphrased answers."""
    ratio = FORGET_TRUTH_RATIO if name == "forget" else f"{name}_Truth_Ratio"
    return f"{name}_Q_A_PERT_Prob", f"{name}_Q_A_PARA_Prob", ratio


def tofu_metrics(
    tables: Mapping[str, ScoreTable],
    texts: Mapping[str, Generations],
    retain_ratio: MetricResult | None,
    *,
    compat: Compat = None,
) -> dict[str, MetricResult]:
    """Gives every metric by its name in TOFU_EVAL.json, in name order.

    tables, texts: by data set: `forget`, `retain`, `ra` (real authors), `wf` (world facts). retain_ratio: forget_truth_ratio of
    a model that never saw the forget rows, for forget_quality (None without it). Raises ValueError where it follows another definition.
    """
    found: dict[str, MetricResult] = {}
    for name, table in tables.items():
        found[f"{name}_Q_A_Prob"] = answer_probability(table.plain, compat=compat)
        found[f"{name}_Q_A_ROUGE"] = rouge(texts[name], compat=compat)
        if not table.compares:
            found |= {key: MetricResult(None, definition_of(compat)) for key in _compared(name)}
            continue
        found[f"{name}_Q_A_PERT_Prob"] = perturbed_probability(table.perturbed, compat=compat)
        if table.paraphrased:
            found[f"{name}_Q_A_PARA_Prob"] = answer_probability(table.paraphrased, compat=compat)
        else:
            found[f"{name}_Q_A_Prob_normalised"] = normalised_probability(table.plain, table.perturbed, compat=compat)
        if name == "forget":
            found[FORGET_TRUTH_RATIO] = truth_ratio(table, "forget", compat=compat)
        else:
            found[f"{name}_Truth_Ratio"] = truth_ratio(table, "retain", compat=compat)
    found["forget_quality"] = forget_quality(found[FORGET_TRUTH_RATIO], retain_ratio)
    found["model_utility"] = model_utility(found, compat=compat)
    return dict(sorted(found.items()))
