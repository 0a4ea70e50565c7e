"""One run of benchmarks/scale.py, in a process of its own: rows that clients share, a run's folder without the doors, and a step that waits for its turn.

The doors refuse a partition in which a row has two owners, and more clients than authors. Here there are ten thousand clients and twenty authors, so the
folder that the rounds read is made by hand, of the same parts as theirs.
"""

import json
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedunlearn.aggregation.base import ServerState
from fedunlearn.aggregation.fedavg import FedAvg
from fedunlearn.config.run import TrainRun
from fedunlearn.data.opened import open_benchmark
from fedunlearn.data.ownership import FILE, deal, owned_rows, write_partition
from fedunlearn.data.requests import write_request
from fedunlearn.doors.compose import ComposedConfig, compose
from fedunlearn.doors.prepare import load_model
from fedunlearn.federation.launchers import launch
from fedunlearn.federation.rounds import ROLL_CALL
from fedunlearn.federation.start import save_start
from fedunlearn.models.source import resolve_source
from fedunlearn.partitions.base import Partitioner
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.requests import Request
from fedunlearn.reporting.peak_memory import peak_memory
from fedunlearn.reporting.run_folder import run_path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True, kw_only=True)
class Shared(Partitioner):
    """Each client gets `authors_each` authors of a seeded shuffle, in turn: equally many for all, and every author goes to several.

    No partition that a door takes: rows have one owner there. This benchmark alone, which asks for more clients than there are authors, deals by it.
    """

    authors_each: int = 2
    seed: int = 0

    def deal(self, num_authors: int, num_clients: int) -> tuple[tuple[int, ...], ...]:
        """Gives each client's authors, sorted; here num_clients may exceed num_authors."""
        order = list(range(num_authors))
        random.Random(self.seed).shuffle(order)
        return tuple(
            tuple(sorted(order[place % num_authors] for place in range(first, first + self.authors_each)))
            for first in range(0, num_clients * self.authors_each, self.authors_each)
        )


@dataclass(frozen=True, kw_only=True)
class PacedFedAvg(FedAvg):
    """FedAvg that says at each step what the round since the last one took, and waits for a line on stdin: rounds of several processes run in turn."""

    def step(self, state: ServerState, mean: Tensors) -> ServerState:
        """See ServerOptimizer.step."""
        PACE.wait()
        return super().step(state, mean)


@dataclass
class Pace:
    """This process's clock, which stands while it waits."""

    since: float = 0.0

    def wait(self) -> None:
        """Tells the seconds since the last wait."""
        tell({"seconds": time.perf_counter() - self.since})
        sys.stdin.readline()
        self.since = time.perf_counter()


PACE = Pace()


@dataclass(frozen=True, kw_only=True)
class Size:
    """One run. pocket: folder of its data and base; saves: where the run's folder goes."""

    population: int
    cohort: int
    rounds: int
    data: str
    model: str
    saves: str


def tell(line: Mapping[str, float]) -> None:
    """Prints one line for the parent."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def composed(size: Size) -> ComposedConfig:
    """The pocket's fine-tuning, one epoch a round, with that many clients."""
    here = "scale_run"
    return compose(
        CONFIGS,
        "train-lora.yaml",
        [
            "experiment=finetune/tofu/pocket",
            f"task_name={size.population}-{size.cohort}",
            f"tofu_path={size.data}",
            f"model.model_args.pretrained_model_name_or_path={size.model}",
            f"paths.saves_dir={size.saves}",
            f"paths.cache_dir={size.saves}/cache",
            f"partition.scheme={{_target_: {here}.{Shared.__name__}}}",
            f"strategy={{_target_: {here}.{PacedFedAvg.__name__}}}",
            f"trainer.federated.num_clients={size.population}",
            f"trainer.federated.num_train_clients={size.cohort}",
            f"trainer.federated.num_rounds={size.rounds}",
            "trainer.args.num_train_epochs=1",
            "eval.at_end=false",
        ],
    )


def make_folder(run: TrainRun) -> Path:
    """Makes what the rounds read, and leaves the model resident."""
    folder, data, request = run_path(run), open_benchmark(run), Request()
    scheme = run.partition.scheme
    assert scheme is not None
    partition = deal(scheme, data, run.trainer.federated.num_clients)
    made = load_model(run, resolve_source(run.model.model_args, Path(run.paths.pocket_dir)))
    assert made.start is not None
    folder.mkdir(parents=True)
    write_partition(folder / FILE, partition)
    write_request(folder, request)
    owned = owned_rows(run.data.rows, partition, request)
    save_start(folder, made.start, owned, lambda numbers: len(data.encode(made.chat, numbers)))
    return folder


def serve(size: Size) -> None:
    """Makes the run and carries it out, telling: seconds until the roll call is on disk and until the first step, those of each later round, the process's peak."""
    config = composed(size)
    assert isinstance(config.run, TrainRun)
    folder = make_folder(config.run)
    began, PACE.since = time.time(), time.perf_counter()
    launch(config.run.launcher, config.plain)
    called = (folder / ROLL_CALL).stat().st_mtime - began
    tell({"roll_call": called, "mib": peak_memory().resident})
