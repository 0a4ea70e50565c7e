"""The process that keeps a node's base and tokenised rows between messages: the very ClientApp of the other launchers, behind a unix socket.

python -m fedunlearn.federation.deployed.worker SITE.yaml KEY SUPERNODE_PID   (a node's first message starts it)
"""

import json
import logging
import os
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedunlearn.config.sites import ClientSite, Policy, read_site
from fedunlearn.errors import UserError
from fedunlearn.federation.client_app import make_client_app
from fedunlearn.federation.deployed.enrolment import Enrolment
from fedunlearn.federation.deployed.frames import (
    LONGEST_TIMEOUT,
    Frame,
    FrameError,
    Patience,
    pack_content,
    receive_frame,
    send_frame,
    unpack_content,
)
from fedunlearn.federation.faults import CLIENT_RAISED
from fedunlearn.federation.local_grid import call_client
from fedunlearn.reporting.console import set_logging

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 1.0
PATIENCE = Patience(seconds=5.0, pace=10 * 2**20)
"""Who connects speaks at once, and no slower than this: while one frame is read nobody else is heard."""
CREDENTIALS = struct.Struct("3i")
RUN_ID = re.compile("[0-9]{1,20}")
NODE = 2
KINDS = ("query", "train", "evaluate")


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What one worker serves: every run of its node that has its base. site: as it was at the start; site_path: its YAML. address: its socket."""

    site: ClientSite
    site_path: Path
    address: Path

    def serve(self) -> None:
        """Answers one connection after another until nothing came for worker.idle_minutes, or it is asked to end; then those that had come by then."""
        with self._listening() as door:
            while (there := _accepted(door, 60 * self.site.worker.idle_minutes)) is not None:
                if not self._serve_one(there):
                    break
            else:
                log.info("nothing came for %g minutes: this worker ends", self.site.worker.idle_minutes)
            self.address.unlink(missing_ok=True)
            while (there := _accepted(door, 0.0)) is not None:
                self._serve_one(there)

    @contextmanager
    def _listening(self) -> Iterator[socket.socket]:
        self.address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
            before = os.umask(0o177)
            try:
                door.bind(str(self.address))
            finally:
                os.umask(before)
            door.listen()
            try:
                yield door
            finally:
                self.address.unlink(missing_ok=True)

    def _serve_one(self, visitor: socket.socket) -> bool:
        """Answers one frame and hangs up; whether the worker goes on. What is no frame costs the sender its answer, and nothing else."""
        with visitor as there:
            try:
                _check_peer(there)
                asked = receive_frame(there, PATIENCE)
            except (FrameError, OSError) as error:
                log.warning("no frame of ours: %s", error)
                return True
            if asked.head.get("do") == "end":
                return False
            with suppress(OSError):  # who has its answer may hang up
                send_frame(there, self._answer(there, asked), PATIENCE)
        return True

    def _answer(self, there: socket.socket, asked: Frame) -> Frame:
        try:
            kind, enrolment = _kind_of(asked.head), self._enrolment(asked.head)
            config = enrolment.read_config()
            content = unpack_content(asked.head.get("content"), asked.blobs)
            policy = read_site(self.site_path, ClientSite).policy  # its owner may have changed it since
            _check_policy(policy, config, kind)
            with _ending_with(there):
                reply = self._call(config, kind, content, policy.max_steps)
            if reply.has_error():
                return _fault(reply.error.code, reply.error.reason or "")
            described, blobs = pack_content(reply.content)
            return Frame({"content": described}, blobs)
        except (UserError, FrameError, _UnwantedError) as error:
            return _fault(CLIENT_RAISED, str(error))
        except Exception as error:
            log.exception("a message could not be answered")
            return _fault(CLIENT_RAISED, f"{type(error).__name__}: {error}")

    def _call(self, config: Mapping[str, Any], kind: str, content: RecordDict, max_steps: int) -> Message:
        app = make_client_app(json.dumps(config, sort_keys=True), max_steps)
        context = Context(1, NODE, {"partition-id": self.site.client_id, "num-partitions": 1}, RecordDict(), {})
        message = Message(content, NODE, kind)
        message.metadata.__dict__["_message_id"] = "asked"
        return call_client(app, context, message)

    def _enrolment(self, head: Mapping[str, Any]) -> Enrolment:
        name = str(head.get("folder"))
        enrolment = Enrolment(Path(self.site.work_dir) / "runs" / name)
        if not RUN_ID.fullmatch(name) or not enrolment.exists:
            raise UserError(f"run {name[:40]!r} is unknown to this node")
        return enrolment


def _check_policy(policy: Policy, config: Mapping[str, Any], kind: str) -> None:
    if kind == "evaluate" and config["mode"] == "unlearn" and not policy.score_forget_rows:
        raise UserError("this node's policy does not let forget rows be scored (policy: score_forget_rows=false)")


def _kind_of(head: Mapping[str, Any]) -> str:
    kind = head.get("kind")
    if head.get("do") != "answer" or kind not in KINDS:
        raise UserError(f"a worker answers {', '.join(KINDS)}, not {str(kind)[:40]!r}")
    return str(kind)


def _fault(code: int, reason: str) -> Frame:
    return Frame({"error": [code, reason]})


def _accepted(door: socket.socket, seconds: float) -> socket.socket | None:
    """The next connection; None where none came in so many seconds."""
    end = time.monotonic() + seconds
    while True:
        left = max(end - time.monotonic(), 0.0)
        door.settimeout(min(left, LONGEST_TIMEOUT))
        try:
            return door.accept()[0]
        except (TimeoutError, BlockingIOError):
            if left == 0:
                return None


def _check_peer(there: socket.socket) -> None:
    """Raises FrameError for a peer of another user: the folder's rights keep others out, and this where somebody has changed them."""
    said = there.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _, user, _ = CREDENTIALS.unpack(said)
    if user != os.geteuid():
        raise FrameError(f"user {user} asked, this worker serves user {os.geteuid()} alone")


class _UnwantedError(Exception):
    """Nobody waits for the answer any more."""


@contextmanager
def _ending_with(there: socket.socket) -> Iterator[None]:
    """While a message is worked on: should its asker go away, nobody wants the answer, and work under way can only be ended with its process.

    Raises _UnwantedError where it has gone already.
    """
    done = threading.Event()
    poll = select.poll()
    poll.register(there, select.POLLRDHUP)
    if poll.poll(0):
        log.warning("who asked is gone: nothing was done")
        raise _UnwantedError("nobody waited for the answer")

    def watch() -> None:
        while not done.is_set():
            if poll.poll(1000 * SECONDS_BETWEEN_LOOKS) and not done.is_set():
                log.warning("who asked is gone: this worker ends")
                _end()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def _end_with_supernode(supernode: int) -> None:
    """Ends this process once its SuperNode is gone, whatever is under way."""
    try:
        process = psutil.Process(supernode)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except psutil.NoSuchProcess:
        pass
    log.warning("its SuperNode is gone: this worker ends")
    _end()


def _end() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)


def main(site_path: str, key: str, supernode: int) -> None:
    """Serves until it is over."""
    set_logging()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    threading.Thread(target=_end_with_supernode, args=(supernode,), daemon=True).start()
    site = read_site(site_path, ClientSite)
    Worker(site=site, site_path=Path(site_path), address=Path(site.work_dir) / f"worker-{key}.sock").serve()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
