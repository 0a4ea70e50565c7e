"""Alternate answers sampled from the reference, for each row by (seed, row), drawn once and kept by hash."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fedunlearn.data.tofu import QaRow
from fedunlearn.errors import UserError
from fedunlearn.evals.generation import sample_texts
from fedunlearn.files import canonical_json, write_json
from fedunlearn.methods.alternates import Sampled
from fedunlearn.models.resident import Resident, numbers_name
from fedunlearn.records.adapter import Weights
from fedunlearn.seeds import seed_of
from fedunlearn.training.charges import Charges
from fedunlearn.training.reference import as_reference

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """texts: row number -> its alternates. tokens: input and new tokens of the draws of rows that these charges had not met, kept ones too."""

    texts: Mapping[int, tuple[str, ...]]
    tokens: int


def sampled_alternates(
    made: Resident,
    reference: Weights,
    rows: Mapping[int, QaRow],
    how: Sampled,
    *,
    seed: int,
    cache: Path,
    charges: Charges,
) -> Drawn:
    """Gives how.count alternates of each row, none of them empty or the row's answer. rows: by number in `full`; seed: the run's.

    Raises UserError naming a row whose draws all equalled its answer.
    """
    known = [numbers_name(made, reference, False), made.chat.provenance, asdict(how), seed]
    drawn: dict[str, tuple[tuple[str, ...], int]] = {}
    for number, row in rows.items():
        name = hashlib.sha256(canonical_json([*known, number, row.question, row.answer]).encode()).hexdigest()
        path = cache / "alternates" / f"{name}.json"
        kept = _read(path, how.count)
        if kept is None:
            with as_reference(made, reference):
                kept = _draw(made, number, row, how, seed)
            write_json(path, {"texts": kept[0], "tokens": kept[1]})
        drawn[name] = kept
    due = charges.due(drawn)
    texts = dict(zip(rows, (texts for texts, _ in drawn.values()), strict=True))
    return Drawn(texts, sum(tokens for name, (_, tokens) in drawn.items() if name in due))


def _draw(made: Resident, number: int, row: QaRow, how: Sampled, seed: int) -> tuple[tuple[str, ...], int]:
    asked = row.question if how.prompt is None else how.prompt.format(question=row.question, answer=row.answer)
    prompt = made.chat.prompt(asked)
    found: list[str] = []
    tokens = 0
    for attempt in range(how.tries + 1):
        wanted = how.count - len(found)
        draws = sample_texts(
            made.model,
            made.chat,
            prompt,
            count=wanted,
            max_new_tokens=how.max_new_tokens,
            seed=seed_of("alternate", seed, number, attempt),
        )
        tokens += sum(len(prompt) + draw.tokens for draw in draws)
        found += [draw.text for draw in draws if draw.text and draw.text != row.answer.strip()]
        if len(found) == how.count:
            return tuple(found), tokens
    raise UserError(
        f"full row {number}: {how.count - len(found)} of {how.count} alternates equal its answer (or are empty) after {how.tries} more draws: the model knows it by heart; "
        "raise method.tries, lower method.samples, or choose another method"
    )


def _read(path: Path, count: int) -> tuple[tuple[str, ...], int] | None:
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        texts = saved["texts"]
        if not isinstance(texts, list) or len(texts) != count or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"no list of {count} texts")
        return tuple(texts), int(saved["tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): the alternates are drawn anew", path, error)
        return None
