"""The run that is attacked: unlearning by NPO on a tiny pocket, as a command of its own, with all that a checkpoint can hold beside the adapter."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from faults.recording import RECIPE

from fedunlearn.data.pocket.build import PocketPaths, ensure_pocket
from fedunlearn.federation.checkpoint import round_folder
from fedunlearn.federation.rounds import ROLL_CALL

ROOT = Path(__file__).resolve().parents[2]
NUM_ROUNDS = 4
COMMON = (
    "trainer.federated.num_clients=4",
    "trainer.args.num_train_epochs=1",
    "trainer.args.per_device_train_batch_size=8",
    "model.model_args.lora_config.r=4",
    "launcher.threads=1",
    "eval.at_end=false",
)
ATTACKED = (
    f"trainer.federated.num_rounds={NUM_ROUNDS}",
    "trainer.federated.min_clients=4",  # a client that is lost is asked again
    "trainer.federated.keep_rounds=all",
    "method=npo",
    "strategy=fedadam",
    "strategy.server_lr=0.01",
    "ledger.enabled=true",
    "ledger.purge=false",
)
TASK = "attacked"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pocket and the fine-tuning run that every attacked one begins with."""

    place: Path
    pocket: PocketPaths

    @classmethod
    def build(cls, place: Path) -> "Stage":
        """Builds both."""
        stage = cls(place=place, pocket=ensure_pocket(7, place / "pocket", RECIPE))
        tuned = stage.start(place, "finetune", "tuned", "trainer.federated.num_rounds=1")
        if tuned.wait() != 0:
            raise RuntimeError(f"the fine-tuning run failed:\n{stage.said(place)}")
        return stage

    def attacked(self, saves: Path, *more: str) -> subprocess.Popen[bytes]:
        """Starts the command that is attacked; its data, adapter and config are the same each time, its folder and cache are its own."""
        start = f"model.model_args.pretrained_model_name_or_path={self.place / 'finetune' / 'tuned'}"
        return self.start(saves, "unlearn", TASK, start, *ATTACKED, *more)

    def start(self, saves: Path, kind: str, task: str, *more: str) -> subprocess.Popen[bytes]:
        """Starts the door; what it says goes to <saves>/said.txt."""
        name = "unlearn-lora.yaml" if kind == "unlearn" else "train-lora.yaml"
        words = (
            f"experiment={kind}/tofu/pocket",
            f"tofu_path={self.pocket.data}",
            f"model.model_args.pretrained_model_name_or_path={self.pocket.model}",
            f"paths.saves_dir={saves}",
            f"paths.cache_dir={saves}/cache",
            f"task_name={task}",
        )
        saves.mkdir(parents=True, exist_ok=True)
        door = (sys.executable, str(ROOT / "src" / "fed_train.py"), f"--config-name={name}")
        with (saves / "said.txt").open("ab") as said:
            return subprocess.Popen(
                [*door, *words, *COMMON, *more], stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=ROOT
            )

    @staticmethod
    def said(saves: Path) -> str:
        """The last that its commands said."""
        return (saves / "said.txt").read_text(encoding="utf-8", errors="replace")[-2000:]


def folder_of(saves: Path) -> Path:
    """The attacked run's folder."""
    return saves / "unlearn" / TASK


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """The run that nobody kills. seconds: the whole command; made: until its folder is there; called: until the roll call is done; trained:
    until the last round is on disk.
    """

    saves: Path
    seconds: float
    made: float
    called: float
    trained: float


def undisturbed(stage: Stage, saves: Path, *overrides: str) -> Undisturbed:
    """Runs it to its end. Raises RuntimeError where it fails by itself."""
    began, folder = time.monotonic(), folder_of(saves)
    running = stage.attacked(saves, *overrides)
    passed = []
    for place in (folder, folder / ROLL_CALL, round_folder(folder, NUM_ROUNDS)):
        while running.poll() is None and not place.exists():
            time.sleep(0.005)
        passed.append(time.monotonic() - began)
    if running.wait() != 0:
        raise RuntimeError(f"the undisturbed run failed:\n{stage.said(saves)}")
    seconds = time.monotonic() - began
    return Undisturbed(saves=saves, seconds=seconds, made=passed[0], called=passed[1], trained=passed[2])
