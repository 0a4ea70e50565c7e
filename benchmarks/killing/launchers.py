"""Launchers under attack: what their command line adds, and which of their processes there is to kill. A new launcher is one entry of LAUNCHERS."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import psutil

When = Literal["start", "round", "checkpoint"]
"""Before the run's folder is there; anywhere from then to the end; while a round's checkpoint is being written."""


@dataclass(frozen=True)
class Victim:
    """A process of a run. mark: a word of its command line; empty: the command itself. called: whether it is killed after the roll call only: before it is not there,
    or left out for good. survived: whether the command goes on without it, and to the same end.
    """

    mark: str = ""
    called: bool = False
    survived: bool = False

    def find(self, command: "subprocess.Popen[bytes]") -> psutil.Process | None:
        """Gives the process; None where it is not there (yet)."""
        try:
            root = psutil.Process(command.pid)
            if not self.mark:
                return root
            return next((p for p in root.children(recursive=True) if self.mark in " ".join(p.cmdline())), None)
        except psutil.Error:
            return None


@dataclass(frozen=True, kw_only=True)
class LauncherUnderAttack:
    """overrides: of the command line. victims: by name. attacks: which of them, and when, one run after another. share: its runs of 20 that are asked for."""

    overrides: tuple[str, ...]
    victims: Mapping[str, Victim]
    attacks: tuple[tuple[str, When], ...]
    share: int


LAUNCHERS: Mapping[str, LauncherUnderAttack] = {
    "local": LauncherUnderAttack(
        overrides=("launcher=local",),
        victims={"command": Victim()},
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
        victims={"command": Victim(), "worker": Victim("fedunlearn.federation.worker", called=True, survived=True)},
        attacks=(("worker", "round"), ("command", "round"), ("worker", "round"), ("command", "checkpoint")),
        share=8,
    ),
    "ray": LauncherUnderAttack(
        overrides=("launcher=ray",),
        victims={
            "command": Victim(),
            "engine": Victim("fedunlearn.federation.ray_child"),
            "client": Victim("ray::ClientAppActor", called=True),
        },
        attacks=(("command", "round"), ("engine", "checkpoint"), ("client", "round"), ("engine", "round")),
        share=8,
    ),
}
