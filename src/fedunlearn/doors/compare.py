"""Many methods on the same request: fine-tune once, the oracle once, then every method; goes on where it was stopped."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.doors.comparison import Comparison, read_comparison
from fedunlearn.doors.compose import ComposedConfig, compose
from fedunlearn.doors.evaluation import run_evaluation
from fedunlearn.doors.reuse import how_to_begin, is_same
from fedunlearn.doors.stages import run_federated
from fedunlearn.errors import NotApplicableError
from fedunlearn.evals.files import EVAL_FILE, read_log
from fedunlearn.models.resident import release
from fedunlearn.protocols.by_method import ByMethod
from fedunlearn.records.comparison import Figures, MethodRun
from fedunlearn.records.evaluation import EvalLog
from fedunlearn.reporting.comparison import SHORT, lines_of, show, write
from fedunlearn.reporting.run_folder import DONE, run_path

log = logging.getLogger(__name__)
MODEL = "model.model_args.pretrained_model_name_or_path="
ORACLE, TUNED = "retrain", "fine-tuned"


def run_comparison(chosen: Comparison) -> Iterator[MethodRun]:
    """Runs what is not done yet and yields a row for each method, request and seed, fine-tuned model and oracle first."""
    _Seed(chosen, chosen.seeds[0]).check()
    for seed in chosen.seeds:
        yield from _Seed(chosen, seed).rows()
    release()


@dataclass(frozen=True)
class _Oracle:
    """The retrain of one request: its run, and the evaluation of that request's rows."""

    folder: Path
    log: Path


@dataclass(frozen=True)
class _Seed:
    """One seed of a comparison."""

    chosen: Comparison
    seed: int

    @property
    def beside(self) -> Sequence[str]:
        """What the request wants of the federation, in every run."""
        wanted: Sequence[str] = self.chosen.recipe["requests"][self.chosen.request].get("federation", [])
        return wanted

    def check(self) -> None:
        """Raises UserError for requests, or a task_name, that no config takes."""
        named = f"task_name={self.chosen.task_name}"
        asked = self._asked(self.chosen.requests)
        self._composed("train-lora.yaml", [*self.chosen.recipe["oracle"], *self.beside, named, *asked])

    def rows(self) -> Iterator[MethodRun]:
        """Runs what is not done yet, and yields a row for each model as soon as it is there."""
        recipe, beside = self.chosen.recipe, self.beside
        tuned = self._train("train-lora.yaml", TUNED, [*recipe["finetune"], *beside])
        oracles: list[_Oracle] = []
        for number in range(1, len(self.chosen.requests) + 1):
            oracle = self._oracle(number, tuned, [*recipe["oracle"], *beside])
            oracles.append(oracle)
            before = self._evaluated(f"{TUNED}{number}", tuned, number, [f"retain_logs_path={oracle.log}"])
            yield self._row(TUNED, "", "", number, tuned, oracle, read_log(before))
            yield self._row(ORACLE, "", "", number, oracle.folder, oracle, read_log(oracle.log))
        for name in self.chosen.methods:
            yield from self._method(name, tuned, oracles)

    def _oracle(self, number: int, tuned: Path, overrides: Sequence[str]) -> _Oracle:
        """The retrain without the rows of requests 1 to `number`; of several it is evaluated on those of the last."""
        asked = self._asked(self.chosen.requests[:number])
        folder = self._train("train-lora.yaml", f"{ORACLE}{number}", [*overrides, f"partition.path={tuned}", *asked])
        if len(self.chosen.requests) == 1:
            return _Oracle(folder, folder / EVAL_FILE)
        return _Oracle(folder, self._evaluated(f"{ORACLE}{number}", folder, number, []))

    def _asked(self, requests: Sequence[str | None]) -> list[str]:
        return [] if requests[0] is None else [f"requests=[{','.join(str(one) for one in requests)}]"]

    def _method(self, name: str, tuned: Path, oracles: Sequence[_Oracle]) -> Iterator[MethodRun]:
        entry = self.chosen.recipe["methods"][name] or {}
        settings = [str(one) for one in entry.get("settings", [])]
        base = self.chosen.recipe[entry.get("recipe", "unlearn")]
        clients = [one for one in self.beside if one.startswith("trainer.")]
        adapter = tuned
        for number, (request, oracle) in enumerate(zip(self.chosen.requests, oracles, strict=True), 1):
            overrides = [
                *base,
                *clients,
                f"method={entry.get('method', name)}",
                "ledger.purge=false",  # the next method reads it too
                *settings,
                MODEL + str(adapter),
                *self._asked([request]),
            ]
            try:
                folder = self._train("unlearn-lora.yaml", f"{name}{number}", overrides, oracle)
            except NotApplicableError as fault:
                yield MethodRun(
                    name=name,
                    protocol="",
                    settings=", ".join(settings),
                    request=number,
                    seed=self.seed,
                    figures=None,
                    why=str(fault),
                )
                return
            protocol = _protocol(folder)
            yield self._row(name, protocol, ", ".join(settings), number, folder, oracle, read_log(folder / EVAL_FILE))
            adapter = folder

    def _row(
        self, name: str, protocol: str, settings: str, number: int, folder: Path, oracle: _Oracle, found: EvalLog
    ) -> MethodRun:
        return MethodRun(
            name=name,
            protocol=protocol,
            settings=settings,
            request=number,
            seed=self.seed,
            figures=_figures(found, _account(folder), _account(oracle.folder)),
        )

    def _train(self, primary: str, name: str, overrides: Sequence[str], oracle: _Oracle | None = None) -> Path:
        """Runs a federation unless it is done already; gives its folder."""
        named = [f"task_name={self.chosen.task_name}_s{self.seed}_{name}", f"trainer.args.seed={self.seed}"]
        named += [] if oracle is None else [f"retain_logs_path={oracle.log}"]
        composed = self._composed(primary, [*overrides, *named])
        folder = run_path(composed.run)
        if not is_same(composed):
            log.info("%s", folder)
            run_federated(self._composed(primary, [*overrides, *named, *how_to_begin(composed)]))
        return folder

    def _evaluated(self, name: str, folder: Path, number: int, more: Sequence[str]) -> Path:
        """Evaluates a run on the rows of one request, unless that is done; gives the log."""
        overrides = [
            *self.chosen.recipe["evaluate"],
            MODEL + str(folder),
            f"task_name={self.chosen.task_name}_s{self.seed}_{name}",
            "overwrite=true",
            *more,
            *self._asked([self.chosen.requests[number - 1]]),
        ]
        composed = self._composed("eval.yaml", overrides)
        if not is_same(composed):
            run_evaluation(composed)
        return run_path(composed.run) / EVAL_FILE

    def _composed(self, primary: str, overrides: Sequence[str]) -> ComposedConfig:
        common = (
            f"pocket_seed={self.seed}",
            f"paths.saves_dir={self.chosen.saves}",
            f"paths.pocket_dir={self.chosen.pocket_dir}",
            f"paths.cache_dir={self.chosen.saves}/cache",
        )
        return compose(self.chosen.configs, primary, [*overrides, *common])


def _account(folder: Path) -> Mapping[str, float]:
    account: dict[str, float] = json.loads((folder / DONE).read_text(encoding="utf-8"))["account"]
    return account


def _protocol(folder: Path) -> str:
    """Gives who worked in a run, by name: a server-side method's own roles are told as such."""
    run = parse_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    if not isinstance(run, TrainRun):
        raise TypeError(f"{folder} is an evaluation")
    if run.server_method is not None:
        return "its own"
    return "InRound" if isinstance(run.protocol, ByMethod) else type(run.protocol).__name__


def _figures(found: EvalLog, spent: Mapping[str, float], oracle: Mapping[str, float]) -> Figures:
    value = {name: metric.agg_value for name, metric in found.metrics.items()}
    return Figures(
        forget_prob=value["forget_Q_A_Prob"],
        forget_quality=value["forget_quality"],
        truth_ratio=value["forget_truth_ratio"],
        utility=value["model_utility"],
        rouge=value["forget_Q_A_ROUGE"],
        tokens=_all_tokens(spent) / _all_tokens(oracle),
        steps=spent["num_steps"] / oracle["num_steps"],
        seconds=spent["seconds"] / oracle["seconds"],
        wall=spent["seconds"],
    )


def _all_tokens(account: Mapping[str, float]) -> float:
    return account["num_tokens"] + account["num_reference_tokens"]


def compare_and_tell(argv: Sequence[str], configs: Path) -> None:
    """Runs a comparison, prints its table and leaves it in <saves>/compare/<task_name>/, after every row anew."""
    chosen = read_comparison(argv, configs)
    folder = chosen.saves / "compare" / chosen.task_name
    runs: list[MethodRun] = []
    for run in run_comparison(chosen):
        runs.append(run)
        if any(one.name == ORACLE for one in runs):
            write(runs, folder)
    console = Console(highlight=False)
    show(lines_of(runs), console, SHORT)
    console.print(f"written to {folder}", soft_wrap=True)
