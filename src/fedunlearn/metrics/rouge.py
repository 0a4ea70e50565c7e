"""ROUGE of generated answers, by rouge_score 0.1.2 with its stemmer, as TOFU and open-unlearning take it."""

from rouge_score.rouge_scorer import RougeScorer

from fedunlearn.metrics.probability import mean_or_none
from fedunlearn.records.evaluation import Compat, Generations, MetricResult, Row, definition_of


def rouge(texts: Generations, *, compat: Compat = None) -> MetricResult:
    """Mean over rows of rougeL_recall in [0, 1]; rows hold rouge1_recall, rougeL_f1, rougeL_recall and the three texts."""
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    triples = zip(texts.inputs, texts.ground_truths, texts.generations, strict=True)
    rows = tuple(_row(scorer, *triple) for triple in triples)
    return MetricResult(mean_or_none([float(row["rougeL_recall"]) for row in rows]), definition_of(compat), rows)  # type: ignore[arg-type]


def _row(scorer: RougeScorer, prompt: str, truth: str, generation: str) -> Row:
    scores = scorer.score(truth, generation)
    return {
        "rouge1_recall": float(scores["rouge1"].recall),
        "rougeL_f1": float(scores["rougeL"].fmeasure),
        "rougeL_recall": float(scores["rougeL"].recall),
        "input": prompt,
        "ground_truth": truth,
        "generation": generation,
    }
