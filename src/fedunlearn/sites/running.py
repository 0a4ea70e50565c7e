"""Processes in the foreground: their lines passed on, their end told, and ended whole with ours."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from fedunlearn.errors import UserError
from fedunlearn.files import take_lock
from fedunlearn.sites.commands import Command
from fedunlearn.sites.exits import why_ended

POLL = 0.1
GRACE = 10.0
"""Seconds between SIGTERM and SIGKILL: Flower forces its own end after five."""
_KEPT_LINES = 60
_PR_SET_PDEATHSIG = 1


def tell(text: str) -> None:
    """Writes a line to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Child:
    """A running command in a process group of its own, so that Ctrl-C reaches us alone and its children end with it.

    retell: what is told instead of a line of it.
    """

    def __init__(self, command: Command, retell: Callable[[str], str] = str) -> None:
        self.command = command
        self._retell = retell
        try:
            self._process = subprocess.Popen(
                command.argv,
                env={**os.environ, **command.environment},
                cwd=command.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )
        except OSError as error:
            raise UserError(
                f"{command.argv[0]} cannot be started ({error.strerror or error}): install fedunlearn into this Python ({sys.executable})"
            ) from error
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._reader = threading.Thread(target=self._pass_on, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's id, which is its group's too."""
        return self._process.pid

    def ended(self) -> int | None:
        """Gives the return code, None while it runs."""
        return self._process.poll()

    def why(self, *, is_node: bool = False) -> str:
        """Why it ended, in words; only once it has."""
        self._reader.join(timeout=2)
        return f"{self.command.name}: {why_ended(self._process.wait(), list(self.lines), is_node=is_node)}"

    def end(self) -> None:
        """SIGTERM to the group, then SIGKILL to what is left of it."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            self.lines.append(line)
            with suppress(OSError):  # nobody hears us any more: the process must not wait at a full pipe for that
                tell(self._retell(line))


def _end_with_parent() -> Callable[[], None] | None:
    """What a child does first: asks the kernel for SIGTERM when we die, were it by SIGKILL. None where the system knows no such thing."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # before the fork, in which nothing should be loaded
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Stop:
    """Whether we were asked to end. signal: by which one, 0 for not yet."""

    def __init__(self) -> None:
        self.signal = 0

    def wait(self, seconds: float) -> bool:
        """Waits, and gives whether we were asked meanwhile."""
        end = time.monotonic() + seconds
        while not self.signal and time.monotonic() < end:
            time.sleep(min(POLL, seconds))
        return bool(self.signal)


@contextmanager
def asked_to_stop() -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGHUP set the flag instead of ending us, so that children are ended first."""
    stop = Stop()

    def note(number: int, _: FrameType | None) -> None:
        stop.signal = number

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def alone_in(work_dir: str) -> Iterator[None]:
    """Holds the work_dir's lock, which the system takes away when we die. Raises UserError where another site holds it."""
    path = Path(work_dir) / "site.lock"
    with path.open("a") as file:
        if not take_lock(file.fileno()):
            raise UserError(
                f"work_dir={work_dir!r}: another site is running in it: end that one, or give each site a work_dir of its own"
            )
        yield


@contextmanager
def nothing_started() -> Iterator[None]:
    """Ctrl-C in here says that nothing had been started."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("nothing had been started") from stop


def interrupted(stop: Stop) -> None:
    """Raises KeyboardInterrupt where the end was asked for by Ctrl-C; SIGTERM is a service's ordinary end."""
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt("everything that was started has ended")


def until(happened: Callable[[], bool], stop: Stop, seconds: float) -> bool:
    """Waits for something, for a stop or for the time to pass; gives whether it happened."""
    end = time.monotonic() + seconds
    while not happened():
        if stop.wait(POLL) or time.monotonic() > end:
            return False
    return True
