"""The whole story on the pocket: fine-tune, retrain the oracle, unlearn, evaluate, compare."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fedunlearn.data.opened import open_tofu
from fedunlearn.doors.compose import ComposedConfig, compose
from fedunlearn.doors.evaluation import run_evaluation
from fedunlearn.doors.finish import account
from fedunlearn.doors.stages import run_federated
from fedunlearn.evals.files import EVAL_FILE
from fedunlearn.files import write_json
from fedunlearn.models.resident import release
from fedunlearn.reporting.console import figures, metric_table
from fedunlearn.reporting.peak_memory import peak_memory

log = logging.getLogger(__name__)
SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One demo: seed of world and training, where configs lie, where results go, and what has been measured so far."""

    seed: int
    configs: Path
    saves: Path
    pocket_dir: Path
    seconds: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | None]] = field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    peaks: list[float] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage's wall clock and peak memory and says when it is done."""
        began = time.monotonic()
        log.info("%s ...", name)
        yield
        self.seconds[name] = time.monotonic() - began
        self.peaks.append(peak_memory().resident)  # each run begins to measure anew
        log.info("%s done in %.1f s", name, self.seconds[name])

    def compose(self, config_name: str, *overrides: str) -> ComposedConfig:
        """Composes a config of the demo's seed and folders."""
        common = (
            f"pocket_seed={self.seed}",
            "overwrite=true",
            f"paths.saves_dir={self.saves}",
            f"paths.pocket_dir={self.pocket_dir}",
            f"paths.cache_dir={self.saves}/cache",
        )
        return compose(self.configs, config_name, [*overrides, *common])

    def train(self, name: str, config_name: str, *overrides: str) -> Path:
        """Runs one federation and keeps what its messages weighed; gives the run's folder."""
        seeded = (f"task_name={name}", f"trainer.args.seed={self.seed}", "eval.at_end=false")
        composed = self.compose(config_name, *overrides, *seeded)
        with self.stage(name):
            run_federated(composed)
        folder = self.saves / ("unlearn" if composed.run.mode == "unlearn" else "finetune") / name
        cost = account(folder)
        self.bytes[name] = {"down": cost.bytes_down, "down_reference": cost.bytes_down_reference, "up": cost.bytes_up}
        return folder

    def evaluate(self, name: str, *overrides: str) -> Path:
        """Evaluates one model; gives the result's folder."""
        composed = self.compose("eval.yaml", "experiment=eval/tofu/pocket", f"task_name={name}", *overrides)
        with self.stage(f"evaluate_{name}"):
            self.metrics[name] = figures(run_evaluation(composed))
        return self.saves / "eval" / name


def run_demo(seed: int, configs: Path, saves: Path, pocket_dir: Path, seconds_so_far: float) -> dict[str, object]:
    """Runs the story and gives what it writes to <saves>/summary.json; prints the comparison as a table.

    seconds_so_far: wall clock spent before (interpreter, imports), told as the stage `start`.
    """
    demo = Demo(seed=seed, configs=configs, saves=saves, pocket_dir=pocket_dir)
    demo.seconds["start"] = seconds_so_far
    with demo.stage("pocket"):
        open_tofu(f"pocket:{seed}", pocket_dir)
    tuned = demo.train("finetuned", "train-lora.yaml", "experiment=finetune/tofu/pocket")
    oracle = demo.train("oracle", "train-lora.yaml", "experiment=retrain/tofu/pocket", f"partition.path={tuned}")
    named = "model.model_args.pretrained_model_name_or_path="
    log_of_oracle = f"retain_logs_path={demo.evaluate('oracle', named + str(oracle)) / EVAL_FILE}"
    unlearned = demo.train("unlearned", "unlearn-lora.yaml", "experiment=unlearn/tofu/pocket", named + str(tuned))
    demo.evaluate("unlearned", named + str(unlearned), log_of_oracle)
    demo.evaluate("finetuned", named + str(tuned), log_of_oracle)
    demo.evaluate("base", "model.model_args.use_lora=false", log_of_oracle)
    release()
    return _tell(demo)


def _tell(demo: Demo) -> dict[str, object]:
    order = ("base", "finetuned", "unlearned", "oracle")
    summary: dict[str, object] = {
        **{name: demo.metrics[name] for name in order},
        "seconds": demo.seconds,
        "bytes": demo.bytes,
        "seed": demo.seed,
        "peak_memory_mib": max(demo.peaks),
    }
    write_json(demo.saves / SUMMARY, summary)
    console = Console(highlight=False)
    console.print(metric_table({name: demo.metrics[name] for name in order}))
    spent = ", ".join(f"{name} {value:.0f}" for name, value in demo.seconds.items())
    console.print(
        f"seconds: {spent}; {sum(demo.seconds.values()):.0f} in all; peak memory {max(demo.peaks):.0f} MiB",
        soft_wrap=True,
    )
    console.print(f"seed {demo.seed}; written to {demo.saves / SUMMARY}", soft_wrap=True)
    return summary
