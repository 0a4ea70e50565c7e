"""Finding, starting and ending the worker of a node. Knows no torch, so that a ClientApp that uses it starts quickly."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedunlearn.config.sites import ClientSite
from fedunlearn.errors import UserError
from fedunlearn.federation.deployed.frames import ClosedError, Frame, FrameError, receive_frame, send_frame

MODULE = "fedunlearn.federation.deployed.worker"
SECONDS_BETWEEN_LOOKS, SECONDS_TO_END = 0.05, 10.0
LONGEST_SOCKET = 100
ROOM = 1.5
"""Memory that a base takes over its files: the same weights cast to float32 need up to twice, mapped ones less; activations come on top."""
QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class LateError(Exception):
    """The worker did not answer in time."""


class GoneError(Exception):
    """The worker died before it answered."""


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
    def _record(self) -> Path:
        return Path(self.site.work_dir) / f"worker-{self.key}.json"

    @property
    def log_path(self) -> Path:
        """Where it writes what it has to say."""
        return Path(self.site.work_dir) / f"worker-{self.key}.log"

    def ask(self, frame: Frame, seconds: float) -> Frame:
        """Gives the worker's answer, starting one where none is there.

        Raises UserError where none can be started, LateError where it took longer than `seconds` from now on (the worker is then ended), GoneError where it
        died, FrameError where it answered with something else.
        """
        with self._connected() as there:
            there.settimeout(seconds)
            try:
                send_frame(there, frame)
                return receive_frame(there)
            except TimeoutError as error:
                self.end()
                raise LateError(f"no answer within {seconds:g} s, the worker was ended") from error
            except (OSError, ClosedError) as error:
                self.end()
                raise GoneError(f"the worker died before it answered; its last words: {self._last_words()}") from error
            except FrameError:
                self.end()
                raise

    @contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as there:
            if not self._connect(there):
                self._start(there)
            yield there

    def _connect(self, there: socket.socket) -> bool:
        try:
            there.connect(str(self.socket_path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def _start(self, there: socket.socket) -> None:
        """Starts a worker and connects to it. Two messages that come at once start one: the second waits for the lock, and finds it."""
        if len(os.fsencode(self.socket_path)) > LONGEST_SOCKET:
            raise UserError(
                f"work_dir={self.site.work_dir!r} is too long a path for a unix socket: choose one of at most {LONGEST_SOCKET - 30} bytes"
            )
        with self._lock():
            if self._connect(there):
                return
            self.end()
            self._check_memory()
            process = self._spawn()
            end = time.monotonic() + self.site.worker.start_timeout
            while not self._connect(there):
                if process.poll() is not None:
                    raise UserError(f"this node's worker ended before it was ready: {self._last_words()}")
                if time.monotonic() > end:
                    self.end()
                    raise UserError(
                        f"worker.start_timeout={self.site.worker.start_timeout:g}: this node's worker was not ready after so many seconds; raise it"
                    )
                time.sleep(SECONDS_BETWEEN_LOOKS)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (Path(self.site.work_dir) / f"worker-{self.key}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _check_memory(self) -> None:
        """Raises UserError where the base has no room beside what runs already. On CUDA the device says so itself."""
        files = [*self.base.glob("*.safetensors"), *self.base.glob("*.bin")]
        needed = int(ROOM * sum(file.stat().st_size for file in files))
        free = psutil.virtual_memory().available
        if needed > free:
            raise UserError(
                f"this node has {free / 2**30:.1f} GiB of memory left and this base needs about {needed / 2**30:.1f} GiB: "
                "wait until the run that holds another base is over, or end its worker"
            )

    def _spawn(self) -> "subprocess.Popen[bytes]":
        with self.log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(self.site_path), self.key, str(self.supernode)],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**QUIET, **os.environ},
            )
        born = psutil.Process(process.pid).create_time()
        self._record.write_text(json.dumps({"pid": process.pid, "born": born}), encoding="utf-8")
        return process

    def end(self) -> None:
        """Ends the worker and all its children, whatever they do; without one nothing happens."""
        process = self._process()
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                process.wait(SECONDS_TO_END)
        self.socket_path.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def _process(self) -> psutil.Process | None:
        """The worker's process; None where there is none, or its number is another's by now."""
        try:
            said = json.loads(self._record.read_text(encoding="utf-8"))
            process = psutil.Process(int(said["pid"]))
            return process if process.create_time() == said["born"] else None
        except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
            return None

    def _last_words(self) -> str:
        try:
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:300] if lines else "none"
