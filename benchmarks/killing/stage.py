"""The run that is attacked: unlearning by NPO on a tiny pocket, as a command of its own, with all that a checkpoint can hold beside the adapter."""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from faults.recording import RECIPE
from federation_here import ROOT, START, door_words, pocket_words, run_folder

from fedunlearn.data.pocket.build import PocketPaths, ensure_pocket
from fedunlearn.federation.checkpoint import round_folder
from fedunlearn.federation.rounds import ROLL_CALL

NUM_ROUNDS, NUM_CLIENTS = 4, 4
COMMON = (
    f"trainer.federated.num_clients={NUM_CLIENTS}",
    "trainer.args.num_train_epochs=1",
    "trainer.args.per_device_train_batch_size=8",
    "model.model_args.lora_config.r=4",
    "launcher.threads=1",
    "eval.at_end=false",
)
ATTACKED = (
    f"trainer.federated.num_rounds={NUM_ROUNDS}",
    f"trainer.federated.min_clients={NUM_CLIENTS}",  # a client that is lost is asked again
    "trainer.federated.keep_rounds=all",
    "method=npo",
    "strategy=fedadam",
    "strategy.server_lr=0.01",
    "ledger.enabled=true",
    "ledger.purge=false",
)
TASK = "attacked"


@dataclass(frozen=True)
class Place:
    """Where an attacked run lies. saves: paths.saves_dir. alone: whether it shares that with nobody; under launcher=superlink it is the server's, which all runs
    share.
    """

    saves: Path
    task: str = TASK
    alone: bool = True

    @property
    def folder(self) -> Path:
        """The run's own."""
        return run_folder(self.saves, "unlearn", self.task)

    @property
    def told(self) -> Path:
        """What its commands said."""
        return self.saves / f"{self.task}.txt"

    def clear(self) -> None:
        """Takes away what an earlier run left."""
        shutil.rmtree(self.saves if self.alone else self.folder, ignore_errors=True)
        self.told.unlink(missing_ok=True)

    def said(self) -> str:
        """The last that its commands said."""
        return self.told.read_text(encoding="utf-8", errors="replace")[-2000:]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pocket and the fine-tuning run that every attacked one begins with."""

    place: Path
    pocket: PocketPaths

    @classmethod
    def build(cls, place: Path) -> "Stage":
        """Builds both."""
        stage = cls(place=place, pocket=ensure_pocket(7, place / "pocket", RECIPE))
        tuned = Place(place, "tuned")
        if stage.start(tuned, "finetune", "trainer.federated.num_rounds=1").wait() != 0:
            raise RuntimeError(f"the fine-tuning run failed:\n{tuned.said()}")
        return stage

    def attacked(self, place: Place, *more: str) -> subprocess.Popen[bytes]:
        """Starts the command that is attacked; its data, adapter and config are the same each time, its folder is its own, and its cache where it is alone."""
        start = run_folder(self.place, "finetune", "tuned")
        return self.start(place, "unlearn", f"{START}{start}", *ATTACKED, *more)

    def start(self, place: Place, kind: str, *more: str) -> subprocess.Popen[bytes]:
        """Starts the door."""
        words = door_words(kind, place.task, *pocket_words(self.pocket, place.saves), *COMMON, *more)
        place.saves.mkdir(parents=True, exist_ok=True)
        with place.told.open("ab") as told:
            return subprocess.Popen(
                [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=told, stderr=told, cwd=ROOT
            )


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """The run that nobody kills. seconds: the whole command; made: until its folder is there; called: until the roll call is done; trained:
    until the last round is on disk.
    """

    place: Place
    seconds: float
    made: float
    called: float
    trained: float


def undisturbed(stage: Stage, place: Place, *overrides: str) -> Undisturbed:
    """Runs it to its end. Raises RuntimeError where it fails by itself."""
    began, folder = time.monotonic(), place.folder
    running = stage.attacked(place, *overrides)
    passed = []
    for sign in (folder, folder / ROLL_CALL, round_folder(folder, NUM_ROUNDS)):
        while running.poll() is None and not sign.exists():
            time.sleep(0.005)
        passed.append(time.monotonic() - began)
    if running.wait() != 0:
        raise RuntimeError(f"the undisturbed run failed:\n{place.said()}")
    seconds = time.monotonic() - began
    return Undisturbed(place=place, seconds=seconds, made=passed[0], called=passed[1], trained=passed[2])
