"""ROUGE of generated answers, by rouge_score 0.1.2 with its stemmer, as TOFU and open-unlearning take it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedunlearn.metrics.base import Evidence, Metric, Part, Reading
from fedunlearn.metrics.probability import mean_or_none
from fedunlearn.records.evaluation import Compat, Generations, MetricResult, Row, definition_of

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Score = Literal["rouge1_recall", "rougeL_f1", "rougeL_recall"]


@dataclass(frozen=True, kw_only=True)
class Rouge(Metric):
    """ROUGE of a data set's generations. score: which of the three is aggregated (TOFU: rougeL_recall, MUSE: rougeL_f1)."""

    of: str
    score: Score = "rougeL_recall"

    @property
    def reads(self) -> frozenset[Reading]:
        """Generations."""
        return frozenset({Reading(self.of, Part.TEXTS)})

    def compute(self, found: Evidence) -> MetricResult:
        """See rouge."""
        return rouge(found.texts[self.of], self.score, compat=found.compat)


def rouge(texts: Generations, score: Score = "rougeL_recall", *, compat: Compat = None) -> MetricResult:
    """Mean over rows of a score in [0, 1]; rows hold rouge1_recall, rougeL_f1, rougeL_recall and the three texts."""
    from rouge_score.rouge_scorer import RougeScorer  # seconds, which whoever merely reads a config need not wait

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    triples = zip(texts.inputs, texts.ground_truths, texts.generations, strict=True)
    rows = tuple(_row(scorer, *triple) for triple in triples)
    return MetricResult(mean_or_none([float(row[score]) for row in rows]), definition_of(compat), rows)  # type: ignore[arg-type]


def _row(scorer: "RougeScorer", prompt: str, truth: str, generation: str) -> Row:
    scores = scorer.score(truth, generation)
    return {
        "rouge1_recall": float(scores["rouge1"].recall),
        "rougeL_f1": float(scores["rougeL"].fmeasure),
        "rougeL_recall": float(scores["rougeL"].recall),
        "input": prompt,
        "ground_truth": truth,
        "generation": generation,
    }
