"""The global adapter's evaluation while a run goes on: on the base that this process holds, some rows of each data set, a few metrics."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.config.run import TrainRun
from fedunlearn.data.requests import own_request
from fedunlearn.evals.dataset import Sets, drawn_rows
from fedunlearn.evals.evaluation import evaluate_sets
from fedunlearn.evals.evidence import Passes
from fedunlearn.evals.store import EvalStore
from fedunlearn.evals.suites import read_suite
from fedunlearn.federation.site import Site
from fedunlearn.records.adapter import Adapter


@dataclass(frozen=True, eq=False)
class RoundEvaluation:
    """Evaluations of one run's rounds. It draws no random numbers but those that choose the rows, by the run's seed, and leaves nothing behind in the model that a client reads."""

    run: TrainRun
    folder: Path

    def due(self, number: int) -> bool:
        """Whether a round is evaluated."""
        every = self.run.eval.every_n_rounds
        return every is not None and number % every == 0

    def figures(self, adapter: Adapter) -> dict[str, float | None]:
        """Gives the aggregates of eval.round_metrics (and of what they are made of) under an adapter, side-car included. Raises UserError for a loss that is not finite."""
        made = self._site.made
        made.put(adapter)
        found = evaluate_sets(Passes(made.model, made.chat, self._settings, EvalStore(None)), self._sets, None, {})
        return {name: result.agg_value for name, result in found.items()}

    @cached_property
    def _site(self) -> Site:
        return Site(self.run)

    @cached_property
    def _settings(self) -> EvalConfig:
        return self.run.eval.for_rounds()

    @cached_property
    def _sets(self) -> Sets:
        request = own_request(self.folder)
        asked = request if request.rows else None
        sets = read_suite(self._site.data, self.run.forget_split, self._settings, asked).sets
        wanted, seed = self.run.eval.round_rows, self.run.trainer.args.seed
        return {name: data.only(drawn_rows(data.num_rows, wanted, seed, name)) for name, data in sets.items()}
