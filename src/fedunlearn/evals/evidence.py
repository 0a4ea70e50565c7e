"""The passes of an evaluation: from data sets to the tables and texts that its metrics read, and no more."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.evals.dataset import EncodedSet
from fedunlearn.evals.generation import generate_texts
from fedunlearn.evals.gradnorm import gradient_norms
from fedunlearn.evals.scoring import score_rows
from fedunlearn.evals.store import EvalStore
from fedunlearn.evals.tables import generations_of, names_of, table_of, wanted_rows
from fedunlearn.files import canonical_json
from fedunlearn.metrics.base import Part
from fedunlearn.records.evaluation import AnswerScore, Detail, Generations, ScoreTable

Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Passes:
    """One model under one configuration. store: what it has said before."""

    model: nn.Module
    chat: ChatFormat
    settings: EvalConfig
    store: EvalStore

    def table(self, encoded: EncodedSet, parts: frozenset[Part], reference: Sequence[AnswerScore]) -> ScoreTable:
        """Scores what is read of a data set. reference: its plain answers under the reference model. Raises UserError for a number that is not finite, naming the row."""
        names = names_of(encoded)

        def score(wanted: Mapping[EncodedRow, Detail]) -> Mapping[EncodedRow, AnswerScore]:
            settings = self.settings
            return score_rows(
                self.model,
                wanted,
                pad_id=self.chat.pad_id,
                batch_tokens=settings.batch_tokens,
                compat=settings.compat,
                names=names,
            )

        wanted = wanted_rows(encoded, parts)
        scores = self.store.scores(wanted, score) if wanted else {}
        norms = self._gradnorms(encoded, names) if Part.GRADNORM in parts else []
        return table_of(self.chat, encoded, parts, scores, reference, norms)

    def _gradnorms(self, encoded: EncodedSet, names: Mapping[EncodedRow, str]) -> list[float]:
        of = self.settings.gradnorm_of
        norms = self.store.gradnorms(of, encoded.plain, lambda rows: gradient_norms(self.model, rows, of, names))
        return [norms[row] for row in encoded.plain]

    def texts(self, encoded: EncodedSet) -> Generations:
        """Lets the model answer every question of a data set."""
        settings, own = self.settings, encoded.continuation
        limit = settings.max_new_tokens if own is None else min(settings.max_new_tokens, own.max_new_tokens)
        stops = () if own is None else own.stops

        def generate(prompts: Sequence[Ids]) -> Sequence[str]:
            return generate_texts(
                self.model,
                self.chat,
                prompts,
                batch_size=settings.generation_batch_size,
                max_new_tokens=limit,
                compat=settings.compat,
                stops=stops,
            )

        name = f"{limit}{f'-{hashlib.sha256(canonical_json(stops).encode()).hexdigest()[:16]}' if stops else ''}"
        return generations_of(self.chat, encoded, self.store.texts(name, encoded.prompts, generate))
