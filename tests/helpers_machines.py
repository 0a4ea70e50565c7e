"""The machines of docs/deployment.md: a folder each is its home, and its commands are run there, on a host of its own where there are hosts."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from federation_here import Running
from helpers_hosts import SERVER, Hosts

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = ("fed.example", "a.example", "b.example", "c.example")
IN_THE_SHELL = ("cat", "cp", "mkdir", "rm", "sed", "ssh-keygen")
PLACED = ("sudo", "git", "python3", ".", "ssh")
"""What a machine's owner does once, and a test does not: packages, nginx, tunnels."""


@dataclass(frozen=True)
class Line:
    """One command of a document. machine: the name in its block's first line, "" without one. words: with the block's variables put in."""

    machine: str
    words: tuple[str, ...]
    text: str

    @property
    def stays(self) -> bool:
        """Whether it is a part of a federation that stays in the foreground."""
        return self.words[1:3] == ("scripts/superlink.py", "start") or (
            self.words[1] == "scripts/supernode.py" and len(self.words) == 3
        )


def lines_of(text: str) -> Iterator[Line]:
    """Every command of a document's blocks, in order."""
    for block in BLOCK.findall(text):
        machine, known = "", {}
        for line in block.splitlines():
            if line.startswith("# on "):
                machine = line.removeprefix("# on ")
            elif found := re.fullmatch(r'(\w)="(.*)"', line):
                known["$" + found[1]] = shlex.split(found[2])
            else:
                words = shlex.split(line, comments=False)
                yield Line(machine, tuple(one for word in words for one in known.get(word, [word])), line)


class Machines:
    """folder: holds their homes, and what they have at /srv. hosts: where there are some, fed.example is the first."""

    def __init__(self, folder: Path, pocket, hosts: Hosts | None = None) -> None:
        self.folder, self.hosts, self.running = folder, hosts, []
        (folder / "srv").mkdir(parents=True)
        (folder / "srv" / "tofu").symlink_to(pocket.data)
        (folder / "srv" / "base").symlink_to(pocket.model)
        for name in NAMES:
            checkout(self.there(name))

    def there(self, machine: str) -> Path:
        """Where its commands are run."""
        return self.folder / machine / "fedunlearn"

    def run(self, line: Line, *more: str) -> subprocess.CompletedProcess:
        """Runs a command to its end, which must be a good one."""
        if line.words[0] == "scp":
            return self._copy(line)
        words = [*self._at(line.machine), *self._words(line), *more]
        done = subprocess.run(words, cwd=self.there(line.machine), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, f"{line.text}\n{done.stdout}{done.stderr}"
        return done

    def start(self, line: Line) -> Running:
        """Starts a part that stays."""
        log = self.folder / f"{line.machine}.log"
        _, *words = self._words(line)
        running = Running(log, *words, before=self._at(line.machine), folder=self.there(line.machine))
        self.running.append(running)
        running.wait_for("the SuperLink is up" if "superlink.py" in line.words[1] else "SuperNode ID", 120)
        return running

    def end(self) -> list[int]:
        """Ends what stays, the last first; gives their codes."""
        return [running.end() for running in reversed(self.running)]

    def _at(self, machine: str) -> list[str]:
        return self.hosts.at(NAMES.index(machine)) if self.hosts else []

    def _words(self, line: Line) -> list[str]:
        if line.words[0] in IN_THE_SHELL:
            return ["sh", "-c", line.text]
        home = str(self.there(line.machine).parent)
        changed = [word.replace("/srv/", f"{self.folder}/srv/").replace("~", home) for word in line.words]
        python, *rest = [SERVER if self.hosts and word == "fed.example" else word for word in changed]
        assert python == "python", line.text
        return [sys.executable, *rest]

    def _copy(self, line: Line) -> subprocess.CompletedProcess:
        """scp as it is between these homes."""
        *sources, target = (self._place(word, line.machine) for word in line.words[1:] if word != "-r")
        for source in sources:
            if source.is_dir():
                shutil.copytree(source, target / source.name)
            else:
                shutil.copy(source, target)
        return subprocess.CompletedProcess(line.text, 0)

    def _place(self, word: str, machine: str) -> Path:
        name, colon, path = word.partition(":")
        return self.folder / name / path if colon else self.there(machine) / word


def checkout(folder: Path) -> Path:
    """What a clone of the repository has, as far as commands name it."""
    folder.mkdir(parents=True)
    for name in ("src", "configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    return folder
