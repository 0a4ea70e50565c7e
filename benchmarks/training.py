"""What the switches of training come to on this machine: gradient checkpointing, compiled blocks, making a batch.

    python benchmarks/training.py [--json] [--threads 2] [--steps 12]

A random Llama of 8 blocks and 10 M parameters, LoRA of rank 16 on every linear layer, steps of 8 rows. Peak memory is that of a process of its own, with checkpointing and without, on rows
of 256 tokens; seconds are means over steps after the first. Exit code 1 where checkpointing saves less than a third of what a step takes, or the adapters differ by more than 1e-5.
Compiling takes up to a minute.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from methods import ROWS, VOCAB, made_model
from safetensors.torch import load_file, save_file

from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.trainer import TrainArgs
from fedunlearn.data.chat import EncodedRow
from fedunlearn.data.collator import collate
from fedunlearn.models.resident import Resident
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.reporting.peak_memory import peak_memory, reset_peak
from fedunlearn.training.client_update import client_update
from fedunlearn.training.compiled import compiled_blocks
from fedunlearn.training.local import LocalData, LocalResult, LocalSettings

LEAST_SAVED, TOLERANCE = 1 / 3, 1e-5


@dataclass(frozen=True, kw_only=True)
class Told:
    """Figures. plain_mib, saving_mib: what one step takes above the loaded model, without and with checkpointing; difference: of the two adapters, by their largest change.

    eager_seconds, compiled_seconds: a step's; compiling_seconds: the first step. batch_seconds: making one batch.
    """

    plain_mib: float
    saving_mib: float
    plain_seconds: float
    saving_seconds: float
    difference: float
    eager_seconds: float
    compiled_seconds: float
    compiling_seconds: float
    batch_seconds: float

    @property
    def faults(self) -> list[str]:
        """What does not hold."""
        rules = [
            (self.saving_mib <= (1 - LEAST_SAVED) * self.plain_mib, "checkpointing saves less than a third"),
            (self.difference <= TOLERANCE, "checkpointing changes the adapter"),
        ]
        return [fault for holds, fault in rules if not holds]


def rows_of(length: int) -> tuple[EncodedRow, ...]:
    """Eight rows of that many tokens, the last 8 of them labels."""
    ids = torch.randint(1, VOCAB, (ROWS, length), generator=torch.Generator().manual_seed(1)).tolist()
    return tuple(EncodedRow(tuple(row), length - 8) for row in ids)


def start_of(made: Resident) -> dict[str, torch.Tensor]:
    """The start adapter with a B that is not zero, so that A has a gradient."""
    if made.start is None:
        raise ValueError("the model has no adapter")
    generator = torch.Generator().manual_seed(3)
    return {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in made.start.tensors.items()}


def train(made: Resident, length: int, steps: int = 1, *, saving: bool = False) -> LocalResult:
    """Trains so many steps by SGD, whose update is the gradient itself."""
    args = TrainArgs(
        learning_rate=1.0,
        optim="sgd",
        max_grad_norm=0.0,
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        lr_scheduler_type="constant",
        gradient_checkpointing=saving,
    )
    task = ClientTask(client_id=0, role=Role.FINETUNE, epochs=1.0, lr_scale=1.0, seed=1)
    data = LocalData(forget=(), retain=rows_of(length))
    settings = LocalSettings(args=args, collator=CollatorConfig(), method=None)
    return client_update(made, start_of(made), data, task, settings)


def alone(saving: bool, out: Path) -> None:
    """One step of 256 tokens in this process, and what it took; the adapter goes to a file."""
    made = made_model()
    train(made, 16, saving=saving)
    reset_peak()
    before = peak_memory().resident
    done = train(made, 256, saving=saving)
    save_file(done.tensors, out)
    sys.stdout.write(json.dumps([peak_memory().resident - before, done.seconds]))


def in_own_process(saving: bool, out: Path, threads: int) -> tuple[float, float]:
    """Gives MiB and seconds of `alone`."""
    command = [sys.executable, __file__, "--alone", "on" if saving else "off", "--out", str(out), "--threads", str(threads)]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    mib, seconds = json.loads(done.stdout)
    return mib, seconds


def changed_by(first: Path, second: Path) -> float:
    """The largest difference of two adapters, in parts of the largest change from the start."""
    start = start_of(made_model())
    one, other = load_file(first), load_file(second)
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    return max(float((one[name] - other[name]).abs().max()) for name in one) / moved


def seconds_a_step(made: Resident, steps: int) -> float:
    """After a first step, seconds of each that follows, on rows of 64 tokens."""
    return train(made, 64, steps).seconds / steps


def batch_seconds() -> float:
    """Seconds to make a batch of 8 rows of 256 tokens."""
    rows = rows_of(256)
    began = time.perf_counter()
    for _ in range(100):
        collate(rows, CollatorConfig(), 0, torch.device("cpu"))
    return (time.perf_counter() - began) / 100


def measure(steps: int, threads: int) -> Told:
    """Runs everything."""
    with tempfile.TemporaryDirectory() as folder:
        plain, saving = Path(folder) / "plain", Path(folder) / "saving"
        plain_mib, plain_seconds = in_own_process(False, plain, threads)
        saving_mib, saving_seconds = in_own_process(True, saving, threads)
        difference = changed_by(plain, saving)
    made = made_model()
    train(made, 64)
    eager = seconds_a_step(made, steps)
    with compiled_blocks(made.model):
        compiling = train(made, 64).seconds
        compiled = seconds_a_step(made, steps)
    return Told(
        plain_mib=plain_mib,
        saving_mib=saving_mib,
        plain_seconds=plain_seconds,
        saving_seconds=saving_seconds,
        difference=difference,
        eager_seconds=eager,
        compiled_seconds=compiled,
        compiling_seconds=compiling,
        batch_seconds=batch_seconds(),
    )


def main() -> int:
    """Measures and tells; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--alone", choices=("on", "off"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.alone:
        alone(args.alone == "on", args.out)
        return 0
    told = measure(args.steps, args.threads)
    if args.json:
        print(json.dumps({**asdict(told), "faults": told.faults}))
    else:
        print(
            f"one step of {ROWS} x 256 tokens: {told.plain_mib:.0f} MiB, with checkpointing {told.saving_mib:.0f} MiB"
        )
        print(
            f"  seconds: {told.plain_seconds:.2f} and {told.saving_seconds:.2f}; adapters differ by {told.difference:.1e}"
        )
        print(f"one step of {ROWS} x 64 tokens: {told.eager_seconds:.3f} s, compiled {told.compiled_seconds:.3f} s")
        print(f"  the first compiled step: {told.compiling_seconds:.1f} s")
        print(f"making a batch of {ROWS} x 256 tokens: {1e3 * told.batch_seconds:.2f} ms")
        print("\n".join(told.faults) or "all bounds hold")
    return 1 if told.faults else 0


if __name__ == "__main__":
    sys.exit(main())
