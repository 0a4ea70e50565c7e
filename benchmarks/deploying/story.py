"""The whole story on the pocket over launcher=superlink, timed, and the same with launcher=local."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from differences import largest_difference
from federation_here import START, FederationHere, Running, door_words, pocket_words, run_folder, submitted

from fedunlearn.data.pocket.build import PocketPaths
from fedunlearn.evals.files import EVAL_FILE
from fedunlearn.federation.checkpoint import read_history
from fedunlearn.federation.rounds import ROLL_CALL
from fedunlearn.reporting.run_folder import DONE

CLIENTS, TOLERANCE, LATEST = 3, 1e-6, 1800.0
SUMMARY = "TOFU_SUMMARY.json"
FIGURES = {"forget Prob": "forget_Q_A_Prob", "utility": "model_utility", "forget quality": "forget_quality"}


@dataclass(frozen=True, kw_only=True)
class Act:
    """One run of the story. kind: of its experiment; recipe: its rounds there; more: of its command line, wherever the runs lie that it goes on from."""

    task: str
    kind: str
    recipe: int
    more: tuple[str, ...] = ()


ACTS = (
    Act(task="finetuned", kind="finetune", recipe=10),
    Act(task="oracle", kind="retrain", recipe=10, more=("partition.path={saves}/finetune/finetuned",)),
    Act(
        task="unlearned",
        kind="unlearn",
        recipe=4,
        more=(START + "{saves}/finetune/finetuned", f"retain_logs_path={{saves}}/finetune/oracle/{EVAL_FILE}"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Played:
    """A run that has ended. Seconds: until the SuperLink had taken it; from there until its folder stood (a ServerApp starts, torch, data and model are loaded); of the
    roll call (workers start and load the base where they are new); of the first round; of the others, their median (None: there was one); of the result's evaluation; of the whole
    command. bytes: down, down for the reference, up. figures: of the evaluation.
    """

    task: str
    rounds: int
    submitted: float
    prepared: float
    roll_call: float
    first_round: float
    later_rounds: float | None
    finished: float
    whole: float
    bytes: tuple[int, int, int]
    figures: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Story:
    """acts: over launcher=superlink. differences: largest one of the adapters to launcher=local's, by task. up: seconds until all nodes were there."""

    acts: tuple[Played, ...]
    differences: Mapping[str, float]
    up: float

    @property
    def holds(self) -> bool:
        """Whether the adapters are launcher=local's."""
        return all(difference <= TOLERANCE for difference in self.differences.values())


def tell_story(place: Path, pocket: PocketPaths, rounds: int) -> Story:
    """Runs it. rounds: of each stage at most. Raises FailedError where a command does not end well."""
    began = time.monotonic()
    with FederationHere(place / "federation", clients=CLIENTS, data=pocket.data, model=pocket.model) as federation:
        up = time.monotonic() - began
        acts = tuple(_play(federation, act, min(rounds, act.recipe)) for act in ACTS)
        differences = {}
        for act in ACTS:
            if act.kind != "retrain":
                _play_here(place / "local", pocket, act, min(rounds, act.recipe))
                mine, its = (run_folder(saves, act.kind, act.task) for saves in (federation.saves, place / "local"))
                differences[act.task] = largest_difference(mine, its)
    return Story(acts=acts, differences=differences, up=up)


def _play(federation: FederationHere, act: Act, rounds: int) -> Played:
    began = time.time()
    more = [word.format(saves="saves") for word in act.more]
    command = federation.submit(act.kind, act.task, f"trainer.federated.num_rounds={rounds}", *more)
    taken = submitted(command)
    command.done(LATEST)
    whole, folder = time.monotonic() - command.began, federation.run_folder(act.kind, act.task)
    stood, called = (_written(folder / name) - began for name in ("provenance.json", ROLL_CALL))
    lines = read_history(folder)
    last = _written(folder / "history.jsonl") - began
    seconds = [float(str(line["seconds"])) for line in lines]
    spent = json.loads((folder / DONE).read_text())["account"]
    summary = json.loads((folder / SUMMARY).read_text())
    return Played(
        task=act.task,
        rounds=len(lines),
        submitted=taken,
        prepared=stood - taken,
        roll_call=called - stood,
        first_round=seconds[0],
        later_rounds=median(seconds[1:]) if seconds[1:] else None,
        finished=whole - last,
        whole=whole,
        bytes=(spent["bytes_down"], spent["bytes_down_reference"], spent["bytes_up"]),
        figures={name: summary.get(key) for name, key in FIGURES.items()},
    )


def _written(path: Path) -> float:
    return path.stat().st_mtime


def _play_here(saves: Path, pocket: PocketPaths, act: Act, rounds: int) -> None:
    """The same run with launcher=local, not evaluated."""
    saves.mkdir(exist_ok=True)
    more = [word.format(saves=saves) for word in act.more if not word.startswith("retain_logs_path")]
    words = (
        *pocket_words(pocket, saves),
        f"trainer.federated.num_clients={CLIENTS}",
        f"trainer.federated.num_rounds={rounds}",
        "launcher=local",
        "launcher.threads=1",
        "eval.at_end=false",
    )
    Running(saves / f"{act.task}.log", *door_words(act.kind, act.task, *words, *more)).done(LATEST)
