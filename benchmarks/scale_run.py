"""One run of benchmarks/scale.py, in a process of its own: rows that clients share, a run's folder without the doors, and rounds that wait for their turn.

The doors refuse a partition in which a row has two owners, and more clients than authors. Here there are ten thousand clients and twenty authors, so the
folder that the rounds read is made by hand, of the same parts as theirs.
"""

import json
import random
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedunlearn.config.run import TrainRun
from fedunlearn.data.opened import open_benchmark
from fedunlearn.data.ownership import FILE, deal, owned_rows, write_partition
from fedunlearn.data.requests import write_request
from fedunlearn.doors.compose import ComposedConfig, compose
from fedunlearn.doors.prepare import load_model
from fedunlearn.federation.client_app import make_client_app
from fedunlearn.federation.local_grid import RUN_ID, SERVER_NODE, LocalGrid
from fedunlearn.federation.server_app import make_server_app
from fedunlearn.federation.start import save_start
from fedunlearn.models.resident import Resident
from fedunlearn.models.source import resolve_source
from fedunlearn.partitions.base import Partitioner
from fedunlearn.records.requests import Request
from fedunlearn.reporting.peak_memory import peak_memory
from fedunlearn.reporting.run_folder import run_path

HERE = "scale_run"
"""This module, however it was begun."""
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


@dataclass
class Pace:
    """This process's clocks, wall and CPU, which stand while it waits."""

    wall: float = 0.0
    cpu: float = 0.0

    def start(self) -> None:
        """Sets both to zero."""
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def wait(self) -> None:
        """Tells the seconds since the last wait, and waits for a line."""
        tell({"seconds": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu})
        sys.stdin.readline()
        self.start()


class PacedGrid(LocalGrid):
    """launcher=local's grid, but that each round's tasks wait for a line on stdin before they go out: rounds of several processes run in turn."""

    def __init__(self, client_app: ClientApp, num_clients: int, pace: Pace) -> None:
        super().__init__(client_app, num_clients)
        self._pace = pace

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See Grid.push_messages."""
        pushed = list(messages)
        if pushed[0].metadata.message_type == MessageType.TRAIN:
            self._pace.wait()
        return super().push_messages(pushed)


@dataclass(frozen=True, kw_only=True)
class Size:
    """One run. population: registered clients, of which `cohort` are drawn each round. data, model: folders of a pocket; saves: where the run's folder goes."""

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
            f"partition.scheme={{_target_: {HERE}.{Shared.__name__}}}",
            f"trainer.federated.num_clients={size.population}",
            f"trainer.federated.num_train_clients={size.cohort}",
            f"trainer.federated.num_rounds={size.rounds}",
            "trainer.args.num_train_epochs=1",
            "trainer.args.per_device_train_batch_size=20",
            "eval.at_end=false",
        ],
    )


def make_folder(size: Size) -> None:
    """Makes what the rounds read."""
    run = run_of(size)
    folder, data, request = run_path(run), open_benchmark(run), Request()
    scheme = run.partition.scheme
    assert scheme is not None
    partition = deal(scheme, data, size.population)
    made = loaded(run)
    assert made.start is not None
    folder.mkdir(parents=True)
    write_partition(folder / FILE, partition)
    write_request(folder, request)
    owned = owned_rows(run.data.rows, partition, request)
    save_start(folder, made.start, owned, lambda numbers: len(data.encode(made.chat, numbers)))


def run_of(size: Size) -> TrainRun:
    """The run's records."""
    run = composed(size).run
    assert isinstance(run, TrainRun)
    return run


def loaded(run: TrainRun) -> Resident:
    """The process's model."""
    return load_model(run, resolve_source(run.model.model_args, Path(run.paths.pocket_dir)))


def serve(size: Size) -> None:
    """Carries out a run whose folder is made, telling what lies between two waits: the roll call and all else before the first round, then each round but the last.

    Then, told after one more round, the process's peak.
    """
    loaded(run_of(size))
    config_json = json.dumps(composed(size).plain, sort_keys=True)
    pace = Pace()
    grid = PacedGrid(make_client_app(config_json), size.population, pace)
    pace.start()
    make_server_app(config_json)(grid, Context(RUN_ID, SERVER_NODE, {}, RecordDict(), {}))
    tell({"mib": peak_memory().resident})
