"""The Grid of launcher.isolate=true: all clients in one worker process, which is ended at a client's deadline and started anew.

Only the client that was being worked on is lost. What the worker sends is never trusted: its size is bounded before it is
read, and whatever cannot be read becomes an error reply.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Pipe

from flwr.app import Error, Message, MessageType
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from fedunlearn.errors import UserError
from fedunlearn.federation.faults import CLIENT_DIED, CLIENT_TIMEOUT, REPLY_TOO_LARGE, REPLY_UNREADABLE
from fedunlearn.federation.local_grid import SequentialGrid
from fedunlearn.federation.watchdog import watchdog
from fedunlearn.federation.worker import READY, Charge

log = logging.getLogger(__name__)
MAX_REPLY_BYTES = 2**31 - 1
"""Protobuf writes no longer message."""

# The parent's sys.path comes first of all: this package, and a user's own modules, may be found through it alone.
_BOOT = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv[1])
from fedunlearn.federation.worker import serve
serve(int(sys.argv[2]))
"""


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """Seconds. start: until a worker is ready, charged to no client; query: for one client's roll call; train: for one client's turn of anything else."""

    start: float
    query: float
    train: float

    def of(self, message: Message) -> float:
        """The deadline of one message."""
        category = message.metadata.message_type.partition(".")[0]
        return self.query if category == MessageType.QUERY else self.train


class IsolatedGrid(SequentialGrid):
    """Runs the ClientApp of `charge` in a worker process, started by start() or by the first message, and by the next one after a loss.

    The error reply of a lost client has a code of fedunlearn.federation.faults. Pulling raises UserError where no worker can be
    started. close() leaves no process behind.
    """

    def __init__(self, charge: Charge, deadlines: Deadlines, max_reply_bytes: int = MAX_REPLY_BYTES) -> None:
        super().__init__(charge.num_clients)
        self._charge = charge
        self._deadlines = deadlines
        self._max_reply_bytes = max_reply_bytes
        self._worker: _Worker | None = None

    def start(self) -> None:
        """Starts a worker where none is ready. Raises UserError where it dies before it is, or takes longer than the start's deadline."""
        if self._worker is not None and self._worker.is_ready():
            return
        self.close()
        log.info("starting the clients' process")
        worker = _Worker()
        try:
            ready = worker.exchange(json.dumps(asdict(self._charge)).encode(), self._deadlines.start, len(READY))
        except _WorkerError as fault:
            raise UserError(self._not_started(fault)) from fault
        if ready != READY:
            worker.end()
            raise UserError("launcher.isolate=true: the clients' process answered its start with something else")
        self._worker = worker

    def close(self) -> None:
        """Ends the worker, whatever it is doing; a message that is pulled later starts another."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _answer(self, message: Message) -> Message:
        self.start()
        assert self._worker is not None
        frame = message_to_proto(message).SerializeToString()
        try:
            reply = self._worker.exchange(frame, self._deadlines.of(message), self._max_reply_bytes)
            return _read(reply, message)
        except _WorkerError as fault:
            self.close()
            return Message(Error(fault.code, str(fault)), reply_to=message)

    def _not_started(self, fault: "_WorkerError") -> str:
        way_out = "or go on without it: launcher.isolate=false"
        if fault.code == CLIENT_TIMEOUT:
            return (
                f"launcher.start_timeout={self._deadlines.start:g}: the clients' process was not ready after so many seconds. "
                f"Raise it (imports from a slow disk take longest), {way_out}"
            )
        return f"launcher.isolate=true: before it was ready, {fault}. Its own messages stand above: mend the cause, {way_out}"


def _read(frame: bytes, message: Message) -> Message:
    """Gives the reply in a frame; of what the worker wrote, content or error is taken and the rest made anew."""
    try:
        read = message_from_proto(ProtoMessage.FromString(frame))
        if read.metadata.reply_to_message_id != message.metadata.message_id:
            raise ValueError("it answers another message")
        return Message(read.error if read.has_error() else read.content, reply_to=message)
    except Exception as error:  # flwr's readers raise whatever the bytes lead them to
        raise _WorkerError(REPLY_UNREADABLE, f"the reply cannot be read: {type(error).__name__}: {error}") from error


class _WorkerError(Exception):
    """A worker gave no usable frame; the message says why, in words for a line of history."""

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        super().__init__(reason)


class _Worker:
    """One process with a session of its own, and the pipe to it. After a fault, or end(), it is of no use any more."""

    def __init__(self) -> None:
        self._pipe, there = Pipe()
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(there.fileno())],
                pass_fds=[there.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
            )

    def is_ready(self) -> bool:
        """Whether the pipe is silent, as it must be while nothing is asked: else the process died, or has sent what nobody asked for."""
        return not self._pipe.closed and not self._pipe.poll(0)

    def exchange(self, frame: bytes, seconds: float, max_bytes: int) -> bytes:
        """Sends a frame and gives the one that comes back; the whole of both within `seconds`. Raises _WorkerError, the process being ended then."""
        late = threading.Event()

        def bite() -> None:
            late.set()
            self._kill()

        try:
            with watchdog(seconds, bite):
                self._pipe.send_bytes(frame)
                return self._pipe.recv_bytes(max_bytes)
        except (EOFError, OSError, MemoryError) as error:
            too_large = not self._pipe.readable or isinstance(
                error, MemoryError
            )  # the pipe shuts itself at such a length
            self.end()
            if late.is_set():
                raise _WorkerError(CLIENT_TIMEOUT, f"no reply within {seconds:g} s, its process was ended") from error
            if too_large:
                raise _WorkerError(REPLY_TOO_LARGE, f"a reply of more than {max_bytes} bytes") from error
            raise _WorkerError(CLIENT_DIED, f"the clients' process died ({self._how()})") from error
        except BaseException:  # Ctrl-C: a reply that comes later would be taken for the next client's
            self.end()
            raise

    def end(self) -> None:
        """Ends the process and its children, and waits for it."""
        if self._process.returncode is None:
            self._kill()
            self._process.wait()
        self._pipe.close()

    def _kill(self) -> None:
        """The group, before anybody has waited for its leader: no other process can have got its number."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(OSError), socket.fromfd(self._pipe.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.shutdown(socket.SHUT_RDWR)  # a child of the worker in yet another session may hold the other end open

    def _how(self) -> str:
        code = self._process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
