"""What a client's process holds where two share its base (trainer.parallel=fsdp), beside one process that has it alone.

    python benchmarks/sharding.py [--json] [--threads 1] [--blocks 8]

A random Llama of 8 blocks and 8 M parameters (or of more blocks) in float32, LoRA of rank 16 on every linear layer; two steps of two rows of 32 tokens by SGD. Told are the bytes of parameters that each process holds,
and by how much each one's peak of memory is above that with a model of next to nothing (which is libraries): one process in a process of its own, the two in theirs, all of them on the CPU. Exit code 1 where a process holds more
than half of the base and a hundredth, or where the adapters differ by more than 1e-5 of their largest change. The peak has no bound: of a base this small, buffers of the processes' messages and
the layer that is gathered take as much as the other half. A minute.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from methods import VOCAB, made_model
from safetensors.torch import load_file, save_file

from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.model import TemplateArgs
from fedunlearn.config.parallel import ParallelArgs
from fedunlearn.config.trainer import TrainArgs
from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.models.base import load_tokenizer
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.reporting.peak_memory import peak_memory, reset_peak
from fedunlearn.training.client_update import CarryOut, client_update
from fedunlearn.training.local import LocalData, LocalSettings
from fedunlearn.training.parallel.job import Frame
from fedunlearn.training.parallel.rank import Sharer
from fedunlearn.training.parallel.serving import Place
from fedunlearn.training.parallel.shards import TOKENIZER, save_parts, whole_model
from fedunlearn.training.parallel.team import Team

SELF, START, ALONE = Path(__file__).stem, "start", "alone"
LENGTH, ROWS, SLACK, TOLERANCE = 32, 4, 0.01, 1e-5
LEAST = {"hidden_size": 16, "intermediate_size": 16}
TEMPLATE = TemplateArgs(
    apply_chat_template=False, user_start_tag="", user_end_tag="", asst_start_tag="", asst_end_tag=""
)


@dataclass(frozen=True, kw_only=True)
class Told:
    """In MiB: base, what lies in one process alone; shards, of each of the two; adapters, what each of them holds whole; peaks above those with a model of next to nothing.

    difference: of the adapters, in parts of their largest change.
    """

    base: float
    shards: tuple[float, ...]
    adapters: tuple[float, ...]
    lone_peak: float
    peaks: tuple[float, ...]
    difference: float

    @property
    def held_ratio(self) -> float:
        """What the fuller process holds of the base."""
        return max(self.shards) / self.base

    @property
    def peak_ratio(self) -> float:
        """The higher peak beside the lone process's."""
        return max(self.peaks) / self.lone_peak

    @property
    def faults(self) -> list[str]:
        """What does not hold."""
        rules = [
            (self.held_ratio <= 0.5 + SLACK, "a process holds more than half of the base"),
            (self.difference <= TOLERANCE, "the two processes come to another adapter"),
        ]
        return [fault for holds, fault in rules if not holds]


class Measured(Sharer):
    """A client's process that tells with its answer what it took."""

    def __init__(self, place: Place, **charge: Any) -> None:
        reset_peak()
        self._before = peak_memory().resident
        super().__init__(place, **charge)

    def do(self, job: Frame) -> Frame:
        """As a Sharer, and its peak in the place of what it says when it is asked for it alone."""
        if job.said["job"] == "peak":
            return Frame({"mib": peak_memory().resident - self._before}, {})
        return super().do(job)


def trained(made: Resident, start: Tensors, carry_out: CarryOut | None) -> Tensors:
    """Two steps from `start`."""
    args = TrainArgs(
        learning_rate=1.0,
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        lr_scheduler_type="constant",
    )
    ids = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    rows = tuple(EncodedRow(tuple(row), LENGTH - 8) for row in ids)
    task = ClientTask(client_id=0, role=Role.FINETUNE, epochs=1.0, lr_scale=1.0, seed=1)
    settings = LocalSettings(args=args, collator=CollatorConfig(), method=None)
    return client_update(made, start, LocalData(forget=(), retain=rows), task, settings, carry_out).tensors


def start_of(made: Resident) -> Tensors:
    """The start adapter with a B that is not zero, so that A has a gradient."""
    if made.start is None:
        raise ValueError("the model has no adapter")
    generator = torch.Generator().manual_seed(3)
    return {n: t + 0.02 * torch.randn(t.shape, generator=generator) for n, t in made.start.tensors.items()}


def alone(folder: Path) -> None:
    """Reads the base that two processes read, trains its adapter in this one, and tells the peak."""
    chat, start = ChatFormat(load_tokenizer(folder / TOKENIZER), TEMPLATE, 128), load_file(folder / START)
    reset_peak()
    before = peak_memory().resident
    model = whole_model(folder, "sdpa", torch.device("cpu"))
    made = Resident(model, chat, "", "", torch.device("cpu"), None)
    save_file(dict(trained(made, start, None)), folder / ALONE)
    sys.stdout.write(json.dumps(peak_memory().resident - before))


def by_one(folder: Path, threads: int) -> float:
    """Gives the peak of `alone`."""
    command = [sys.executable, __file__, "--alone", str(folder), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return float(json.loads(done.stdout))


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """One model trained both ways. held: of each of the two processes (shards.Held); moved: the largest change; away: the adapters' largest difference."""

    lone_peak: float
    peaks: tuple[float, ...]
    held: tuple[Mapping[str, int], ...]
    base: int
    moved: float
    away: float


def run_of(made: Resident, threads: int) -> Run:
    """Trains the model by two processes and by one."""
    start = start_of(made)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        args = ParallelArgs(kind="fsdp", processes=2)
        team = Team(made, args, device="cpu", timeout=300.0, scratch=folder, entry=f"{SELF}:Measured")
        try:
            found = trained(made, start, team.carry_out)
            peaks = tuple(float(answer.said["mib"]) for answer in team.group.ask(Frame({"job": "peak"}, {})))
        finally:
            team.close()
        save_parts(made, folder)
        save_file(dict(start), folder / START)
        lone_peak = by_one(folder, threads)
        wanted = load_file(folder / ALONE)
    return Run(
        lone_peak=lone_peak,
        peaks=peaks,
        held=team.held,
        base=sum(p.numel() * p.element_size() for name, p in made.model.named_parameters() if "lora_" not in name),
        moved=max(float((wanted[name] - start[name]).abs().max()) for name in wanted),
        away=max(float((wanted[name] - found[name]).abs().max()) for name in wanted),
    )


def measure(threads: int, blocks: int) -> Told:
    """Runs everything: the model, and one of next to nothing, whose peak is what libraries take."""
    sizes = {"num_hidden_layers": blocks}
    small, run = (run_of(made_model(**sizes, **others), threads) for others in (LEAST, {}))
    return Told(
        base=run.base / 2**20,
        shards=tuple(held["shards"] / 2**20 for held in run.held),
        adapters=tuple(held["whole"] / 2**20 for held in run.held),
        lone_peak=run.lone_peak - small.lone_peak,
        peaks=tuple(peak - least for peak, least in zip(run.peaks, small.peaks, strict=True)),
        difference=run.away / run.moved,
    )


def main() -> int:
    """Measures and tells; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.alone:
        alone(args.alone)
        return 0
    told = measure(args.threads, args.blocks)
    if args.json:
        ratios = {"held_ratio": told.held_ratio, "peak_ratio": told.peak_ratio}
        print(json.dumps({**asdict(told), **ratios, "faults": told.faults}))
    else:
        both = "/".join(f"{mib:.1f}" for mib in told.shards)
        print(f"of a base of {told.base:.1f} MiB two processes hold {both} MiB: {told.held_ratio:.3f} of it")
        print(f"  and both adapters whole: {told.adapters[0]:.1f} MiB each")
        peaks = "/".join(f"{mib:.0f}" for mib in told.peaks)
        print(
            f"peak above that with a model of next to nothing: {peaks} MiB, alone {told.lone_peak:.0f} MiB: {told.peak_ratio:.2f}"
        )
        print(f"adapters differ by {told.difference:.1e} of their largest change")
        print("\n".join(told.faults) or "all bounds hold")
    return 1 if told.faults else 0


if __name__ == "__main__":
    sys.exit(main())
