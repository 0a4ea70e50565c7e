"""Launchers under attack: what their command line adds, and which of their processes there is to kill. A new launcher is one entry of LAUNCHERS."""

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import psutil
from federation_here import SERVER_APP, SUPERLINK, FederationHere

When = Literal["start", "round", "checkpoint"]
"""Before the run's folder is there; anywhere from then to the end; while a round's checkpoint is being written."""
Command = subprocess.Popen[bytes]
Find = Callable[[Command, FederationHere | None], psutil.Process | None]
"""Gives a process of a run; None where it is not there (yet)."""
NODE = 1
"""The client whose worker and node are attacked: it owns what is to be forgotten."""


def _the_command(command: Command, _: FederationHere | None) -> psutil.Process | None:
    return psutil.Process(command.pid)


def _below(mark: str) -> Find:
    """A process that the command started, by a word of its command line."""

    def find(command: Command, _: FederationHere | None) -> psutil.Process | None:
        started = psutil.Process(command.pid).children(recursive=True)
        return next((process for process in started if mark in " ".join(process.cmdline())), None)

    return find


def _of_server(program: str) -> Find:
    return lambda _, federation: federation and federation.of_server(program)


def _worker(_: Command, federation: FederationHere | None) -> psutil.Process | None:
    return federation and federation.worker_of(NODE)


def _node(_: Command, federation: FederationHere | None) -> psutil.Process | None:
    return federation and psutil.Process(federation.nodes[NODE].process.pid)


@dataclass(frozen=True)
class Victim:
    """A process of a run. while_rounds: whether it is there only until the last of them. called: whether it is killed after the roll call only: before it is not
    there, or left out for good. survived: whether the run goes on without it, and to the same end. machine: whether all that it started dies with it, and it is
    then started again.
    """

    find: Find = _the_command
    while_rounds: bool = True
    called: bool = False
    survived: bool = False
    machine: bool = False


COMMAND = Victim(while_rounds=False)


@dataclass(frozen=True, kw_only=True)
class LauncherUnderAttack:
    """overrides: of the command line. victims: by name. attacks: which of them, and when, one run after another. share: its runs of 20 that are asked for.

    deployed: whether it takes a federation of real processes, one for all its runs, which then come one after the other. tolerance: the largest difference of adapters that the launcher
    is held to; 0: byte for byte.
    """

    overrides: tuple[str, ...]
    victims: Mapping[str, Victim]
    attacks: tuple[tuple[str, When], ...]
    share: int
    deployed: bool = False
    tolerance: float = 0.0


LAUNCHERS: Mapping[str, LauncherUnderAttack] = {
    "local": LauncherUnderAttack(
        overrides=("launcher=local",),
        victims={"command": COMMAND},
        attacks=(
            ("command", "checkpoint"),
            ("command", "round"),
            ("command", "round"),
            ("command", "checkpoint"),
            ("command", "start"),
        ),
        share=12,
    ),
    "isolate": LauncherUnderAttack(
        overrides=("launcher=local", "launcher.isolate=true"),
        victims={
            "command": COMMAND,
            "worker": Victim(_below("fedunlearn.federation.worker"), called=True, survived=True),
        },
        attacks=(("worker", "round"), ("command", "round"), ("worker", "round"), ("command", "checkpoint")),
        share=8,
    ),
    "ray": LauncherUnderAttack(
        overrides=("launcher=ray",),
        victims={
            "command": COMMAND,
            "engine": Victim(_below("fedunlearn.federation.ray_child")),
            "client": Victim(_below("ray::ClientAppActor"), called=True),
        },
        attacks=(("command", "round"), ("engine", "checkpoint"), ("client", "round"), ("engine", "round")),
        share=8,
    ),
    "superlink": LauncherUnderAttack(
        overrides=(),  # the federation's own
        victims={
            "ServerApp": Victim(_of_server(SERVER_APP)),
            "SuperLink": Victim(_of_server(SUPERLINK), survived=True),
            "worker": Victim(_worker, called=True, survived=True),
            "SuperNode": Victim(_node, called=True, survived=True, machine=True),
            "submitter": Victim(while_rounds=False, survived=True),
        },
        attacks=(
            ("ServerApp", "round"),
            ("SuperNode", "round"),
            ("SuperLink", "round"),
            ("worker", "round"),
            ("submitter", "round"),
            ("ServerApp", "checkpoint"),
        ),
        share=4,
        deployed=True,
        tolerance=1e-6,
    ),
}
