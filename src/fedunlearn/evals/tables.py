"""From data sets and the readings of all metrics to what is scored, and back into tables."""

from collections.abc import Mapping, Sequence

from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.evals.dataset import EncodedSet
from fedunlearn.evals.generation import decode
from fedunlearn.metrics.base import Part, Reading
from fedunlearn.records.evaluation import AnswerScore, Detail, Generations, ScoreTable

DETAILS: Mapping[Part, Detail] = {
    Part.PLAIN: Detail.LOSS,
    Part.TOKENS: Detail.TOKENS,
    Part.MOMENTS: Detail.MOMENTS,
}


def wanted_rows(encoded: EncodedSet, parts: frozenset[Part]) -> dict[EncodedRow, Detail]:
    """Gives every different answer of a set that somebody reads, with the most that is read of it."""
    wanted: dict[EncodedRow, Detail] = {}
    detail = max((DETAILS[part] for part in parts if part in DETAILS), default=None)
    if detail is not None:
        for row in encoded.plain:
            wanted[row] = max(detail, wanted.get(row, detail))
    others = list(encoded.paraphrased) if Part.PARAPHRASED in parts else []
    if Part.PERTURBED in parts:
        others += [row for answers in encoded.perturbed for row in answers]
    for row in others:
        wanted.setdefault(row, Detail.LOSS)
    return wanted


def names_of(encoded: EncodedSet) -> dict[EncodedRow, str]:
    """Gives each answer's name in messages, by its row."""
    named: dict[EncodedRow, str] = {}
    for i, row in enumerate(encoded.plain):
        answers = (row, *encoded.paraphrased[i : i + 1], *encoded.perturbed[i])
        for answer in answers:
            named.setdefault(answer, f"{encoded.name} row {i}")
    return named


def table_of(
    chat: ChatFormat,
    encoded: EncodedSet,
    parts: frozenset[Part],
    scores: Mapping[EncodedRow, AnswerScore],
    reference: Sequence[AnswerScore],
    gradnorms: Sequence[float],
) -> ScoreTable:
    """Gives a set's table of what was scored; parts that nobody reads stay empty."""
    read = any(part in DETAILS for part in parts)
    wrong = encoded.perturbed if Part.PERTURBED in parts else ()
    right = encoded.paraphrased if Part.PARAPHRASED in parts else ()
    return ScoreTable(
        plain=tuple(scores[row] for row in encoded.plain) if read else (),
        perturbed=tuple(tuple(scores[row] for row in answers) for answers in wrong),
        paraphrased=tuple(scores[row] for row in right),
        label_texts=tuple(decode(chat, row.labels) for row in encoded.plain) if Part.LABEL_TEXT in parts else (),
        reference=tuple(reference),
        gradnorms=tuple(gradnorms),
    )


def generations_of(chat: ChatFormat, encoded: EncodedSet, texts: Mapping[tuple[int, ...], str]) -> Generations:
    """Gives a set's prompts as text, its answers, and what the model said."""
    return Generations(
        inputs=tuple(decode(chat, prompt) for prompt in encoded.prompts),
        ground_truths=encoded.truths,
        generations=tuple(texts[prompt] for prompt in encoded.prompts),
    )


def parts_of(readings: frozenset[Reading]) -> dict[str, frozenset[Part]]:
    """Gives what is read of each data set, by its name."""
    names = sorted({reading.dataset for reading in readings})
    return {name: frozenset(one.part for one in readings if one.dataset == name) for name in names}
