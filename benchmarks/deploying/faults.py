"""What it costs when a process of a running federation fails: one run a fault, against the run that nobody disturbs."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from differences import largest_difference
from faults.recording import RECIPE
from federation_here import SUPERLINK, FailedError, FederationHere, edit, until

from deploying.story import CLIENTS, TOLERANCE
from fedunlearn.data.pocket.build import ensure_pocket
from fedunlearn.federation.checkpoint import read_history

ROUNDS, VICTIM, LATEST = 5, 1, 900.0
TASK_SECONDS, ROUND_TIMEOUT = 20.0, 25.0
BUSY = 0.3
"""CPU seconds of a worker after which it is in its task: a message that it only takes in costs a few hundredths."""
COMMON = (
    f"trainer.federated.num_rounds={ROUNDS}",
    "trainer.args.num_train_epochs=60",  # a task takes seconds, so that there is time to hit it
    "trainer.args.per_device_train_batch_size=8",
    "model.model_args.lora_config.r=4",
    "eval.at_end=false",
)
ALL = (f"trainer.federated.min_clients={CLIENTS}",)
ONE_LESS = (f"trainer.federated.min_clients={CLIENTS - 1}",)
WAY_OUT = "resume=true"
Act = Callable[[FederationHere], None]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """before: what is set up, apart from the run's seconds; strike: what is done in the second round; after: puts things right. equal: whether the same clients count as
    in the undisturbed run.
    """

    name: str
    overrides: tuple[str, ...] = ALL
    before: Act | None = None
    strike: Act | None = None
    after: Act | None = None
    equal: bool = True


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One run. resumed: whether it stopped with an error and was gone on with. lost: seconds against the undisturbed run. difference: of its adapter to that one's.
    counted: in how many rounds the victim counted. ended: its error; empty where it went on by itself. faults: why it does not hold.
    """

    fault: str
    seconds: float
    lost: float
    resumed: bool
    difference: float
    counted: int
    ended: str
    faults: tuple[str, ...]


def _few_steps(federation: FederationHere) -> None:
    edit(federation.policy_of(VICTIM), max_steps=1)  # read anew for every message


def _many_steps(federation: FederationHere) -> None:
    edit(federation.policy_of(VICTIM), max_steps=10_000)


def _busy(federation: FederationHere) -> psutil.Process:
    """The victim's worker, once it is in its task."""
    worker = federation.worker_of(VICTIM)
    if worker is None:
        raise FailedError(f"client {VICTIM} has no worker")
    before = worker.cpu_times().user
    until(lambda: worker.cpu_times().user > before + BUSY, LATEST, "the worker's task begins")
    return worker


def _kill_worker(federation: FederationHere) -> None:
    _busy(federation).kill()


def _stop_worker(federation: FederationHere) -> None:
    _busy(federation).send_signal(signal.SIGSTOP)


def _kill_node(federation: FederationHere) -> None:
    _busy(federation)
    federation.nodes[VICTIM].kill()
    federation.start_again(VICTIM)


def _kill_superlink(federation: FederationHere) -> None:
    _busy(federation)
    superlink = federation.of_server(SUPERLINK)
    if superlink is None:
        raise FailedError("there is no SuperLink")
    superlink.kill()


UNDISTURBED = Fault(name="none")
FAULTS: tuple[Fault, ...] = (
    Fault(
        name=f"a client's worker hangs; max_task_seconds={TASK_SECONDS:g}",
        before=lambda federation: _task_seconds(federation, TASK_SECONDS),
        strike=_stop_worker,
        after=lambda federation: _task_seconds(federation, 3600.0),
    ),
    Fault(name="its worker is killed in its task", strike=_kill_worker),
    Fault(
        name=f"its SuperNode is killed and started again; round_timeout={ROUND_TIMEOUT:g}",
        overrides=(*ONE_LESS, f"trainer.federated.round_timeout={ROUND_TIMEOUT}"),
        strike=_kill_node,
        equal=False,
    ),
    Fault(name="the SuperLink is killed", strike=_kill_superlink),
    Fault(name="a client raises in every task", overrides=ONE_LESS, before=_few_steps, after=_many_steps, equal=False),
)


def _task_seconds(federation: FederationHere, seconds: float) -> None:
    edit(federation.policy_of(VICTIM), max_task_seconds=seconds)


def costs(place: Path) -> Iterator[Cost]:
    """Runs the undisturbed run, then one fault after the other, in one federation."""
    pocket = ensure_pocket(7, place / "pocket", RECIPE)
    with FederationHere(place / "federation", clients=CLIENTS, data=pocket.data, model=pocket.model) as federation:
        first = Fault(name="first", overrides=("trainer.federated.num_rounds=1",))
        _cost(federation, first, "first", None)  # in which workers start and load the base
        whole = _cost(federation, UNDISTURBED, "whole", None)
        yield whole
        for number, fault in enumerate(FAULTS):
            yield _cost(federation, fault, f"fault{number}", whole)


def _cost(federation: FederationHere, fault: Fault, task: str, whole: Cost | None) -> Cost:
    if fault.before:
        fault.before(federation)
    command = federation.submit("finetune", task, *COMMON, *fault.overrides)
    folder = federation.run_folder("finetune", task)
    if fault.strike:
        until(lambda: (folder / "rounds" / "0001").is_dir() or command.process.poll() is not None, LATEST, "round 1")
        fault.strike(federation)
    code = command.process.wait(LATEST)
    ended = "" if code == 0 else command.text().splitlines()[-1]
    faults = [] if code == 0 or (code == 2 and WAY_OUT in ended) else [f"it ended with code {code}: {ended}"]
    if code != 0:
        federation.submit("finetune", task, *COMMON, *fault.overrides, WAY_OUT).done(LATEST)
    seconds = time.monotonic() - command.began
    if fault.after:
        fault.after(federation)
    return _judged(federation, fault, folder, seconds, ended, faults, whole)


def _judged(
    federation: FederationHere,
    fault: Fault,
    folder: Path,
    seconds: float,
    ended: str,
    faults: Sequence[str],
    whole: Cost | None,
) -> Cost:
    difference = 0.0 if whole is None else largest_difference(folder, federation.run_folder("finetune", "whole"))
    counted = [c["weight"] > 0 for line in read_history(folder) for c in line["clients"] if c["client_id"] == VICTIM]
    found = list(faults)
    if fault.equal and (difference > TOLERANCE or sum(counted) != ROUNDS):
        found.append(f"its adapter differs by {difference:.1g}, client {VICTIM} counted in {sum(counted)} rounds")
    if len(counted) != ROUNDS:
        found.append(f"client {VICTIM} was asked in {len(counted)} rounds of {ROUNDS}")
    return Cost(
        fault=fault.name,
        seconds=round(seconds, 1),
        lost=0.0 if whole is None else round(seconds - whole.seconds, 1),
        resumed=bool(ended),
        difference=difference,
        counted=sum(counted),
        ended=ended,
        faults=tuple(found),
    )
