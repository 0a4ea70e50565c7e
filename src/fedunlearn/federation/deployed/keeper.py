"""Finding, starting and ending the worker of a node. Knows no torch, so that a ClientApp that uses it starts quickly."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from fedunlearn.config.sites import ClientSite, make_work_dir
from fedunlearn.errors import UserError
from fedunlearn.federation.deployed.frames import ClosedError, Frame, FrameError, Patience, receive_frame, send_frame
from fedunlearn.files import take_lock, write_json

MODULE = "fedunlearn.federation.deployed.worker"
SECONDS_BETWEEN_LOOKS, SECONDS_TO_END, SECONDS_TO_REAP = 0.05, 10.0, 1.0
LONGEST_SOCKET, LONGEST_WORDS = 103, 4096
ROOM = 1.5
"""Memory that a base takes over its files: the same weights cast to float32 need up to twice, mapped ones less; activations come on top."""
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class LateError(Exception):
    """The worker did not answer in time."""


class GoneError(Exception):
    """The worker died before it answered."""


@dataclass(frozen=True, kw_only=True)
class _Started:
    """What is written down of a worker that was started. needed: bytes of its base in memory. told: bytes of its log that others wrote before it."""

    pid: int
    needed: int
    told: int


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """The worker of one base on one node. key: the enrolment's worker_key. base: folder of the model. supernode: process id that it ends with."""

    site: ClientSite
    site_path: Path
    key: str
    base: Path
    supernode: int

    @property
    def socket_path(self) -> Path:
        """Where it listens."""
        return Path(self.site.work_dir) / f"worker-{self.key}.sock"

    @property
    def log_path(self) -> Path:
        """Where it writes what it has to say."""
        return Path(self.site.work_dir) / f"worker-{self.key}.log"

    @property
    def _record(self) -> Path:
        return Path(self.site.work_dir) / f"worker-{self.key}.json"

    def ask(self, frame: Frame, seconds: float) -> Frame:
        """Gives the worker's answer, starting one where none is there. Messages that come at once take turns: who waits for its turn ends nobody's work.

        Raises UserError where no worker can be started, LateError where it took longer than `seconds` from its turn on (the worker is then ended), or its
        turn did not come in as many; GoneError where the worker died, FrameError where it answered with something else.
        """
        self._check_place()
        with _alone(Path(self.site.work_dir) / f"worker-{self.key}.lock", seconds + self.site.worker.start_timeout):
            return self._ask(frame, seconds)

    def _ask(self, frame: Frame, seconds: float) -> Frame:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as there:
            end = time.monotonic() + seconds
            try:
                if not self._connect(there, end):
                    self._start(there)
                    end = time.monotonic() + seconds
                send_frame(there, frame, _until(end))
                return receive_frame(there, _until(end))
            except TimeoutError as error:
                self.end()
                raise LateError(f"no answer within {seconds:g} s, the worker was ended") from error
            except (OSError, ClosedError) as error:
                words = self._last_words()
                self.end()
                raise GoneError(f"the worker died before it answered; its last words: {words}") from error
            except FrameError:
                self.end()
                raise

    def _connect(self, there: socket.socket, end: float) -> bool:
        """Whether there is a worker, to which it is connected then. Raises TimeoutError for one that takes nobody."""
        there.settimeout(1.0)
        while time.monotonic() < end:
            try:
                there.connect(str(self.socket_path))
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            except BlockingIOError:  # too many wait already
                time.sleep(SECONDS_BETWEEN_LOOKS)
            else:
                return True
        raise TimeoutError("no connection")

    def _check_place(self) -> None:
        make_work_dir(self.site.work_dir)
        length, name = len(os.fsencode(self.socket_path)), len(self.socket_path.name) + 1
        if length > LONGEST_SOCKET:
            raise UserError(
                f"work_dir={self.site.work_dir!r} is too long a path for a unix socket ({length - name} bytes): choose one of at most {LONGEST_SOCKET - name} bytes"
            )

    def _start(self, there: socket.socket) -> None:
        """Starts a worker and connects to it. Raises UserError where that cannot be."""
        self.end()
        limit = self.site.worker.start_timeout
        # two bases may have room one by one, and not both
        with _alone(Path(self.site.work_dir) / "workers.lock", limit):
            needed = self._checked_memory()
            process = self._spawn(needed)
        end = time.monotonic() + limit
        while not self._is_ready(there, end):
            if process.poll() is not None:
                raise UserError(f"this node's worker ended before it was ready: {self._last_words()}")
            if time.monotonic() > end:
                self.end()
                raise UserError(
                    f"worker.start_timeout={limit:g}: this node's worker was not ready after so many seconds; raise it"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _is_ready(self, there: socket.socket, end: float) -> bool:
        try:
            return self._connect(there, end)
        except TimeoutError:
            return False

    def _checked_memory(self) -> int:
        """Gives the bytes that the base needs. Raises UserError where there is no room for them beside what runs already. On CUDA the device says so itself."""
        files = [*self.base.glob("*.safetensors"), *self.base.glob("*.bin")]
        needed = int(ROOM * sum(file.stat().st_size for file in files))
        free = psutil.virtual_memory().available - self._promised()
        if needed > free:
            raise UserError(
                f"this node has {max(free, 0) / 2**30:.1f} GiB of memory left and this base needs about {needed / 2**30:.1f} GiB: "
                "wait until the run that holds another base is over, or end its worker"
            )
        return needed

    def _promised(self) -> int:
        """Bytes that this node's other workers will yet take: one loads its base with its first message."""
        others = (
            replace(self, key=path.stem.removeprefix("worker-")) for path in self._record.parent.glob("worker-*.json")
        )
        missing = 0
        for other in others:
            found = other._running()
            if found is not None:
                with suppress(psutil.NoSuchProcess):
                    missing += max(found[1].needed - found[0].memory_info().rss, 0)
        return missing

    def _spawn(self, needed: int) -> "subprocess.Popen[bytes]":
        with self.log_path.open("ab") as log:
            told = log.tell()
            process = subprocess.Popen(
                [sys.executable, *self._words, str(self.supernode)],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**QUIET, **os.environ},
            )
        started = _Started(pid=process.pid, needed=needed, told=told)
        write_json(self._record, asdict(started))
        return process

    @property
    def _words(self) -> list[str]:
        """By what its process is known."""
        return ["-m", MODULE, str(self.site_path), self.key]

    def end(self) -> None:
        """Ends the worker and all its children, whatever they do; without one nothing happens."""
        found = self._running()
        if found is not None:
            with suppress(ProcessLookupError):
                os.killpg(found[0].pid, signal.SIGKILL)
            _wait_for(found[0])
        self.socket_path.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def _started(self) -> _Started | None:
        try:
            started = _Started(**json.loads(self._record.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return started if all(type(value) is int for value in vars(started).values()) else None

    def _running(self) -> tuple[psutil.Process, _Started] | None:
        """The worker's process; None where there is none, or its number is another's by now."""
        started = self._started()
        try:
            process = None if started is None else psutil.Process(started.pid)
            known = process is not None and process.cmdline()[1:-1] == self._words
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return None
        return (process, started) if process is not None and started is not None and known else None

    def _last_words(self) -> str:
        """The last line that the worker that was started last has written."""
        started = self._started()
        try:
            with self.log_path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(started.told if started else 0, end - LONGEST_WORDS))
                lines = log.read(LONGEST_WORDS).decode("utf-8", errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:300] if lines else "none"


def _wait_for(process: psutil.Process) -> None:
    """Waits until a killed process is gone, or is a zombie, that holds nothing any more, of a parent that never asks for it."""
    end = time.monotonic() + SECONDS_TO_END
    with suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
        process.wait(SECONDS_TO_REAP)  # our own child's zombie goes with this, once its last thread has ended


@contextmanager
def _alone(lock: Path, seconds: float) -> Iterator[None]:
    """Inside the block nobody else has this lock; it goes with its process. Raises LateError where others hold it for so long."""
    end = time.monotonic() + seconds
    with lock.open("w") as file:
        while not take_lock(file.fileno()):
            if time.monotonic() > end:
                raise LateError(f"other tasks kept this node's worker busy for {seconds:g} s, nothing was done")
            time.sleep(SECONDS_BETWEEN_LOOKS)
        yield


def _until(end: float) -> Patience:
    return Patience(seconds=end - time.monotonic())
