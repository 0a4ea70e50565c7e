"""A federation of real processes on loopback, with TLS and node keys: for the benchmarks, and for the tests that start one."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import psutil
import yaml

from fedunlearn.data.pocket.build import PocketPaths
from fedunlearn.sites.certificates import Federation, make_federation

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS, DOOR = ROOT / "scripts", ROOT / "src" / "fed_train.py"
MODEL = "pocket-base"
"""What nodes know the base by."""
START = "model.model_args.pretrained_model_name_or_path="
SOON, STARTED, UP, ENDED, HEARTBEAT = 10.0, 60.0, 120.0, 30.0, 150.0
"""Seconds until a fault of a site is told, until a node or the SuperLink is up, until all has ended, and until the SuperLink misses a killed node."""
WORKER, SERVER_APP, SUPERLINK = "fedunlearn.federation.deployed.worker", "flwr-serverapp", "flower-superlink"
LOOK = 0.05
_TAKEN = re.compile(r"run \d+ at ")


class FailedError(RuntimeError):
    """A process did not do what it was started for; its text says what it said."""


def door_words(kind: str, task: str, *more: str) -> tuple[str, ...]:
    """The door's command for experiment={kind}/tofu/pocket, without its Python; later overrides win."""
    name = "unlearn-lora.yaml" if kind == "unlearn" else "train-lora.yaml"
    return (str(DOOR), f"--config-name={name}", f"experiment={kind}/tofu/pocket", f"task_name={task}", *more)


def pocket_words(pocket: PocketPaths, saves: Path) -> tuple[str, ...]:
    """What a command is told that runs on this machine alone: the pocket's data and base; runs and cache lie below `saves`."""
    return (
        f"tofu_path={pocket.data}",
        f"{START}{pocket.model}",
        f"paths.saves_dir={saves}",
        f"paths.cache_dir={saves}/cache",
    )


def run_folder(saves: Path, kind: str, task: str) -> Path:
    """Where a run of such a command lies."""
    return saves / ("unlearn" if kind == "unlearn" else "finetune") / task


def free_port() -> int:
    """A port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def trial(folder: Path, **changes: object) -> Path:
    """A federation whose data and model folders are there, empty; each node at a port of its own that is free."""
    for name in ("data", "model"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    wanted = {
        "hosts": ["localhost", "127.0.0.1"],
        "clients": 2,
        "days": 2,
        "models": {"pocket": str(folder / "model")},
        "benchmark": "tofu",
        "data": str(folder / "data"),
        "port": free_port(),
        **changes,
    }
    make_federation(folder, Federation(**wanted))
    for path in folder.glob("client[0-9]*/client*.yaml"):
        edit(path, listen=f"127.0.0.1:{free_port()}")
    return folder


def edit(path: Path, **changes: object) -> Path:
    """Sets keys of a YAML; None takes a key away."""
    data = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    return path


class Running:
    """A command and what it writes. before: what its command line begins with, to run it on another host. folder: where it works."""

    def __init__(self, log: Path, *words: object, before: Sequence[str] = (), folder: Path | None = None) -> None:
        self.log = log
        self.began = time.monotonic()
        command = [*before, sys.executable, *map(str, words)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=folder
            )

    def text(self) -> str:
        """All it has said."""
        return self.log.read_text(errors="replace")

    def wait_for(self, said: str, seconds: float = STARTED) -> float:
        """Waits until it says that; gives the seconds since its start. Raises FailedError where it ends before, or is late."""
        end = time.monotonic() + seconds
        while said not in self.text():
            if self.process.poll() is not None or time.monotonic() > end:
                raise FailedError(f"{said!r} was not said:\n{self.text()}")
            time.sleep(LOOK)
        return time.monotonic() - self.began

    def done(self, seconds: float) -> str:
        """Waits until it has ended well; its text. Raises FailedError for any other end."""
        code = self.process.wait(seconds)
        if code != 0:
            raise FailedError(f"it ended with code {code}:\n{self.text()}")
        return self.text()

    def refused(self, seconds: float = SOON) -> str:
        """Its last line; it must have ended with code 2 in that many seconds of its start."""
        code = self.process.wait(max(0.0, self.began + seconds - time.monotonic()))
        if code != 2:
            raise FailedError(f"it ended with code {code}:\n{self.text()}")
        return self.text().splitlines()[-1]

    def below(self) -> list[psutil.Process]:
        """Everything that it has started, directly or not."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """As when its machine loses power: SIGKILL to it and to all that it started."""
        gone = [psutil.Process(self.process.pid), *self.below()]
        for process in gone:
            process.kill()
        self.process.wait()
        psutil.wait_procs(gone, ENDED)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Ends it; gives its code. Raises FailedError where something that it started is left."""
        if self.process.poll() is None:
            below = self.below()
            self.process.send_signal(number)
            self.process.wait(ENDED)
            _, left = psutil.wait_procs(below, timeout=5)
            if left:
                raise FailedError(f"left behind: {left}")
        return self.process.returncode


def start_server(folder: Path) -> Running:
    """Starts a trial's SuperLink; gives it when it is up."""
    running = Running(folder / "server.log", SCRIPTS / "superlink.py", "start", folder / "server" / "server.yaml")
    try:
        running.wait_for("the SuperLink is up", UP)
    except FailedError:
        running.end()
        raise
    return running


def start_node(site: Path) -> Running:
    """Starts a node."""
    return Running(site.with_suffix(".log"), SCRIPTS / "supernode.py", site)


class FederationHere:
    """A SuperLink and its nodes. folder: of the trial's files; data, model: of all machines; spare: sites whose nodes are not started, with keys that are no client's; policy: changes to
    every node's; saves: the server's folder of runs, where it is not below `folder`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        clients: int,
        spare: int = 0,
        data: Path,
        model: Path,
        policy: Mapping[str, object] | None = None,
        saves: Path | None = None,
    ) -> None:
        self.folder = trial(folder, clients=clients + spare, models={MODEL: str(model)}, data=str(data))
        self.saves = saves or folder / "server" / "saves"
        edit(folder / "server" / "server.yaml", saves_root=str(self.saves))
        keys = self.folder / "server" / "client_keys"
        for client in range(clients, clients + spare):
            (keys / f"client{client}.pub").rename(keys / f"spare{client}.pub")
        for client in range(clients + spare):
            edit(self.policy_of(client), **(policy or {}))
        self.nodes: dict[int, Running] = {}
        self.server = start_server(self.folder)
        try:
            for client in range(clients):
                self.nodes[client] = start_node(self.site_of(client))
            for node in self.nodes.values():
                node.wait_for("SuperNode ID")
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> "FederationHere":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def site_of(self, client: int) -> Path:
        """A client's YAML."""
        return self.folder / f"client{client}" / f"client{client}.yaml"

    def policy_of(self, client: int) -> Path:
        """What its machine allows."""
        return self.folder / f"client{client}" / "policy.yaml"

    @property
    def launcher(self) -> tuple[str, ...]:
        """What a command line adds to run here."""
        listen = yaml.safe_load((self.folder / "server" / "server.yaml").read_text())["listen"]
        return (
            "launcher=superlink",
            f"launcher.address={listen}",
            f"launcher.root_certificates={self.folder}/server/ca.crt",
            "launcher.threads=1",
        )

    def submit(self, kind: str, task: str, *more: str) -> Running:
        """Starts the door's command and gives it, running; see door_words."""
        here = (*self.launcher, f"{START}{MODEL}", f"trainer.federated.num_clients={len(self.nodes)}")
        return Running(self.folder / f"{task}.log", *door_words(kind, task, *here, *more))

    def run_folder(self, kind: str, task: str) -> Path:
        """Where a run lies on the server."""
        return run_folder(self.saves, kind, task)

    def processes(self) -> list[psutil.Process]:
        """All of it that is alive: the scripts, what they started, and the nodes' workers, which are in sessions of their own."""
        scripts = [running for running in (self.server, *self.nodes.values()) if running.process.poll() is None]
        started = [process for running in scripts for process in running.below()]
        workers = [worker for client in self.nodes if (worker := self.worker_of(client))]
        found = {
            process.pid: process
            for process in (*(psutil.Process(one.process.pid) for one in scripts), *started, *workers)
        }
        return [process for process in found.values() if _line(process)]

    def of_server(self, program: str) -> psutil.Process | None:
        """The server's process of that program; None where there is none."""
        return next((process for process in self.server.below() if program in _line(process)), None)

    def worker_of(self, client: int) -> psutil.Process | None:
        """A client's worker; None where there is none."""
        site = str(self.site_of(client))
        return next((p for p in psutil.process_iter() if WORKER in (line := _line(p)) and site in line), None)

    def start_again(self, client: int, seconds: float = HEARTBEAT) -> None:
        """Starts a killed client's node; until its heartbeat is missed the SuperLink refuses its key, so again and again."""
        end = time.monotonic() + seconds
        while True:
            self.nodes[client] = start_node(self.site_of(client))
            try:
                self.nodes[client].wait_for("SuperNode ID")
                return
            except FailedError:
                if time.monotonic() > end:
                    raise
                time.sleep(2)

    def end(self) -> int | None:
        """Ends it all, the server last; gives the server's code. Raises FailedError where something is left."""
        with ExitStack() as all_of_it:  # each is ended, whatever becomes of the others
            for running in (self.server, *self.nodes.values()):
                all_of_it.callback(running.end)
        return self.server.process.returncode


def _line(process: psutil.Process) -> str:
    """A command line; empty where the process is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def until(holds: Callable[[], object], seconds: float, what: str) -> None:
    """Waits. Raises FailedError where it does not happen."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise FailedError(f"{what}: not within {seconds:g} s")
        time.sleep(LOOK)


def submitted(command: Running, seconds: float = UP) -> float:
    """Waits until the SuperLink has taken a run; gives the seconds since the command's start. Raises FailedError where it does not."""
    until(lambda: _TAKEN.search(command.text()) or command.process.poll() is not None, seconds, "the run is submitted")
    if not _TAKEN.search(command.text()):
        raise FailedError(f"the run was not submitted:\n{command.text()}")
    return time.monotonic() - command.began
