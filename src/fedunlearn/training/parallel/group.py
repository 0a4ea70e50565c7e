"""Several processes of this machine that work as one: started together, asked together, ended together."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch

from fedunlearn.errors import UserError
from fedunlearn.training.parallel.job import Frame, receive, send
from fedunlearn.training.parallel.serving import Place

# The parent's sys.path comes first of all: this package, and a user's own modules, may be found through it alone.
_BOOT = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv[1])
from fedunlearn.training.parallel.serving import serve
serve(int(sys.argv[2]))
"""

MALLOC, LARGE = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), 2**20
"""glibc's: blocks above so many bytes go back to the system when they are freed. A layer is gathered and let go again and again, and would be kept in several copies."""
PATIENCE = 1.0
"""Seconds until it is clear that no process died where one of them tells of an error."""


class GroupError(RuntimeError):
    """The processes did not do what they were asked: one of them raised, died or was late. All of them have been ended."""


@dataclass(frozen=True, eq=False)
class _Process:
    rank: int
    process: "subprocess.Popen[bytes]"
    pipe: Connection


class Group:
    """The processes. entry: `module:name` of what makes a serving.Member; world: how many; timeout: seconds for the start, and for each thing that is asked."""

    def __init__(self, entry: str, world: int, *, device: str, timeout: float) -> None:
        self._entry, self._world, self._device, self.timeout = entry, world, device, timeout
        self._processes: list[_Process] = []
        self._end = weakref.finalize(self, _end, self._processes)

    def start(self, folder: Path, charge: Mapping[str, object]) -> list[Mapping[str, Any]]:
        """Starts them and gives what each says when it is ready. folder: theirs to read until then. charge: JSON values that each is made of."""
        try:
            for rank in range(self._world):
                self._launch(rank, folder, charge)
            return [answer.said for answer in self._answers()]
        except BaseException:
            self.close()
            raise

    def ask(self, frame: Frame) -> list[Frame]:
        """Gives the same job to all of them, and the answers by rank. Raises GroupError, or UserError where that is what one of them met; all are ended then."""
        try:
            for one in self._processes:
                send(one.pipe, frame)
            return self._answers()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise GroupError(f"one of the processes cannot be reached ({error}): all of them were ended") from error
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Their process ids, by rank; none where they are not started, or were ended."""
        return tuple(one.process.pid for one in self._processes)

    def close(self) -> None:
        """Ends the processes and waits for them."""
        _end(self._processes)

    def _launch(self, rank: int, folder: Path, charge: Mapping[str, object]) -> None:
        """Starts one; it is among those that close() ends from its first moment on."""
        here, there = Pipe()
        with there:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(there.fileno())],
                pass_fds=[there.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                env={**dict.fromkeys(MALLOC, str(LARGE)), **os.environ},
            )
        self._processes.append(_Process(rank, process, here))
        place = Place(
            rank=rank,
            world=self._world,
            device=self._device,
            folder=str(folder.resolve()),
            threads=max(1, torch.get_num_threads() // self._world),
            timeout=self.timeout,
            log_level=logging.getLogger().getEffectiveLevel(),
        )
        here.send_bytes(json.dumps({"entry": self._entry, "place": asdict(place), "charge": charge}).encode())

    def _answers(self) -> list[Frame]:
        deadline, waiting = time.monotonic() + self.timeout, {one.pipe: one for one in self._processes}
        found: dict[int, Frame] = {}
        while waiting:
            ready = wait(list(waiting), max(deadline - time.monotonic(), 0))
            if not ready:
                late = sorted(one.rank for one in waiting.values())
                raise GroupError(
                    f"processes {late} of {self._world} did not answer within {self.timeout:g} s: all of them were ended"
                )
            for pipe in ready:
                assert isinstance(pipe, Connection)
                one = waiting.pop(pipe)
                found[one.rank] = answer = _read(one)
                if "error" in answer.said:
                    raise GroupError(f"{self._cause(one, answer.said['error'])}: all of them were ended")
        return [found[rank] for rank in sorted(found)]

    def _cause(self, told: _Process, error: str) -> str:
        """Says why one of them met an error: another that died, where one did, for what the rest tell is only that it is missed."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            codes = [one.process.poll() for one in self._processes]
            for rank, code in enumerate(codes):
                if code:
                    return f"process {rank} died ({_how(code)})"
            if None not in codes:
                break
            time.sleep(0.02)
        return f"process {told.rank}: {error}"


def _read(one: _Process) -> Frame:
    """Gives a process's answer. Raises UserError where that is what it met, GroupError where there is none."""
    try:
        answer = receive(one.pipe)
    except (EOFError, OSError) as error:
        with suppress(subprocess.TimeoutExpired):
            one.process.wait(5)
        raise GroupError(f"process {one.rank} died ({_how(one.process.returncode)}): all of them were ended") from error
    if "faults" in answer.said:
        raise UserError(*answer.said["faults"])
    return answer


def _how(code: int | None) -> str:
    if code is None:
        return "it does not speak any more"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end(processes: list[_Process]) -> None:
    for one in processes:
        if one.process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)
    for one in processes:
        one.process.wait()
        one.pipe.close()
    processes.clear()
