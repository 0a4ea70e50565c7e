"""The Ray cluster that launcher=ray works on: attached to, and looked over node by node before a client is sent to one.

Ray hands an actor neither the driver's working directory nor its environment, and finds out nothing about files and packages: all of it is
brought along or asked here, for on a node that lacks something a client fails in the midst of a run, and in words that name no cause.
"""

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedunlearn.config.launcher import RayLauncher
from fedunlearn.errors import UserError

SECONDS_BETWEEN_LOOKS, SECONDS_FOR_A_FILE = 0.5, 10.0
OWN = (
    "local"  # in Ray's words: a cluster of this process's own, whatever RAY_ADDRESS says and whoever else runs one here
)
PACKAGES = ("flwr", "torch", "transformers", "peft", "safetensors")
CARRIED = (
    "CUBLAS_WORKSPACE_CONFIG",
    "FLWR_DISABLE_UPDATE_CHECK",
    "FLWR_TELEMETRY_ENABLED",
    "HF_DATASETS_OFFLINE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_DISABLE_TELEMETRY",
    "HF_HUB_OFFLINE",
    "OMP_WAIT_POLICY",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_OFFLINE",
)
"""Variables that clients are to see as the command did. No tokens: Ray shows a job's environment to whoever reaches the cluster."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that is up. name: its address. cpus, gpus: what Ray may give away there, all together."""

    id: str
    name: str
    cpus: float
    gpus: float

    def holds(self, launcher: RayLauncher) -> int:
        """How many actors fit on it, as Flower's engine counts them."""
        by_cpus = int(self.cpus / launcher.client_cpus)
        return by_cpus if not launcher.client_gpus else min(by_cpus, int(self.gpus / launcher.client_gpus))


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What one machine says of itself. versions: by package, and what is wrong where one cannot be told.

    lacks: the folders and files asked for that are not there, or are others of the same name.
    """

    versions: Mapping[str, str]
    lacks: tuple[str, ...]


def attach(launcher: RayLauncher) -> None:
    """Connects this process to launcher.address, or starts a cluster of its own. Raises UserError with Ray's own words where it refuses."""
    variables = {name: os.environ[name] for name in CARRIED if name in os.environ}
    python_path = [str(Path(place).absolute()) for place in (*sys.path, *_python_path())]
    environment: dict[str, Any] = {
        "env_vars": {**variables, "PYTHONPATH": os.pathsep.join(dict.fromkeys(python_path))},
        "worker_process_setup_hook": _entering(os.getcwd()),
    }
    address = launcher.address or OWN
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=True, runtime_env=environment)
    except Exception as error:  # Ray raises whatever its layers do: RuntimeError, ConnectionError, ValueError, OSError
        where = f"launcher.address={launcher.address!r}" if launcher.address else "launcher=ray"
        told = " ".join(str(error).split())
        raise UserError(
            f"{where}: Ray does not let this process in ({type(error).__name__}: {told}). The cluster must run the same Ray and Python as this machine, and this "
            "machine must be one of its nodes (ray start --address=...); launcher.address=null makes a cluster of its own here"
        ) from error


def _python_path() -> list[str]:
    return [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]


def _entering(folder: str) -> Callable[[], None]:
    """What each worker does first: its paths mean what they mean to the command. Nested, so that it travels by value."""

    def enter() -> None:
        import os

        if os.path.isdir(folder):
            os.chdir(folder)

    return enter


def wait_for_room(launcher: RayLauncher, timeout: float) -> tuple[Node, ...]:
    """Gives the nodes on which actors will be, once launcher.min_nodes are there and all actors have room.

    Flower's engine makes as many actors as the cluster could hold if nobody else were there; one that finds no room would keep its
    clients waiting without a word. Raises UserError where `timeout` seconds pass before that, and at once where no node is large enough.
    """
    end = time.monotonic() + timeout
    while True:
        nodes = _nodes()
        if not (fault := room_fault(launcher, nodes, ray.available_resources())):
            return tuple(node for node in nodes if node.holds(launcher))
        too_small = len(nodes) >= launcher.min_nodes and not any(node.holds(launcher) for node in nodes)
        if too_small or time.monotonic() > end:
            raise UserError(fault)
        time.sleep(SECONDS_BETWEEN_LOOKS)


def room_fault(launcher: RayLauncher, nodes: Sequence[Node], free: Mapping[str, float]) -> str:
    """Why the actors cannot be on these nodes now; empty where they can. free: CPU and GPU that nobody holds."""
    if len(nodes) < launcher.min_nodes:
        there = ", ".join(node.name for node in nodes)
        return f"launcher.min_nodes={launcher.min_nodes}, but {len(nodes)} are in the cluster ({there}): start the others, or lower it"
    asked = f"launcher.client_cpus={launcher.client_cpus:g} and launcher.client_gpus={launcher.client_gpus:g}"
    wanted = sum(node.holds(launcher) for node in nodes)
    if not wanted:
        held = ", ".join(f"{node.name} has {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes)
        return f"{asked} fit on no node of the cluster ({held}): lower them, or start nodes that have more"
    cpus, gpus = free.get("CPU", 0.0), free.get("GPU", 0.0)
    if cpus < launcher.client_cpus * wanted or gpus < launcher.client_gpus * wanted:
        return (
            f"{asked} make {wanted} actors, which the cluster has no room for: {cpus:g} CPUs and {gpus:g} GPUs are free, others hold the rest. A run needs "
            "the cluster to itself: wait for them, or start another cluster on another port"
        )
    return ""


def _nodes() -> list[Node]:
    return [
        Node(
            id=node["NodeID"],
            name=node["NodeManagerAddress"],
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=node["Resources"].get("GPU", 0.0),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def check_nodes(nodes: Sequence[Node], shared: Sequence[Path], needed: Sequence[Path], timeout: float) -> None:
    """Has every node look for what its clients will need. Raises UserError, naming the node, for all that is not as it is here.

    shared: folders that must be the very ones (a file that is written into them here is looked for there); needed: what must exist.
    timeout: seconds for all nodes together.
    """
    with _marked(shared) as marks:
        paths = [str(place.absolute()) for place in needed]
        here = Sight(**looking()(marks, paths, PACKAGES, 0.0))
        look = ray.remote(looking())
        asked = {
            look.options(
                num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)
            ).remote(marks, paths, PACKAGES, SECONDS_FOR_A_FILE): node.name
            for node in nodes
        }
        done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=timeout)
        faults = [f"{_node(asked[one])} did not answer within launcher.start_timeout={timeout:g} s" for one in silent]
        for one in done:
            faults += _faults_of(asked[one], here, one)
    if faults:
        raise UserError(*sorted(faults))


def _node(name: str) -> str:
    return f"launcher=ray: node {name}"


def _faults_of(name: str, here: Sight, answer: Any) -> list[str]:
    try:
        there = Sight(**ray.get(answer))
    except ray.exceptions.RayError as error:
        return [f"{_node(name)} cannot work: {type(error).__name__}: {' '.join(str(error).split())[:300]}"]
    return differences(name, here, there)


def differences(name: str, here: Sight, there: Sight) -> list[str]:
    """One sentence for each thing in which a node is not as this machine is."""
    faults = [
        f"{_node(name)} has {package} {there.versions.get(package, 'not at all')}, this machine {version}: install the same on every node, at the same place"
        for package, version in here.versions.items()
        if there.versions.get(package) != version
    ]
    lacks = sorted(set(there.lacks) - set(here.lacks))
    if lacks:
        faults.append(
            f"{_node(name)} does not see {', '.join(map(repr, lacks))} as this machine does: all nodes need one file system with the same paths"
        )
    return faults


@contextmanager
def _marked(folders: Sequence[Path]) -> Iterator[dict[str, str]]:
    """Leaves a file with a word nobody can guess in each folder for as long as nodes look; gives the words by file."""
    word = uuid.uuid4().hex
    marks = [folder.absolute() / f".seen-{word}" for folder in folders]
    try:
        for mark in marks:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(word, encoding="utf-8")
        yield {str(mark): word for mark in marks}
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)


def looking() -> Callable[[Mapping[str, str], Sequence[str], Sequence[str], float], dict[str, Any]]:
    """Gives the function that looks: nested and of the standard library alone, so that it travels by value to a node without the package."""

    def look(
        marks: Mapping[str, str], paths: Sequence[str], packages: Sequence[str], patience: float
    ) -> dict[str, Any]:
        import importlib
        import importlib.metadata
        import os
        import time

        def is_seen(file: str, word: str) -> bool:
            end = time.monotonic() + patience  # a network file system may show a new file late
            while True:
                try:
                    with open(file, encoding="utf-8") as lines:
                        return lines.read() == word
                except OSError:
                    if time.monotonic() > end:
                        return False
                    time.sleep(0.2)

        versions = {}
        for package in packages:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = "not at all"
        try:
            versions["fedunlearn"] = importlib.import_module("fedunlearn").__version__
        except ImportError:
            versions["fedunlearn"] = "not at all"
        lacks = [os.path.dirname(file) for file, word in marks.items() if not is_seen(file, word)]
        lacks += [path for path in paths if not os.path.exists(path)]
        return {"versions": versions, "lacks": tuple(lacks)}

    return look
