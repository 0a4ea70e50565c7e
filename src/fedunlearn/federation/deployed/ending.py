"""Asking a node's workers to end, in place of waiting for worker.idle_minutes. Knows no torch."""

import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from fedunlearn.config.sites import ClientSite, read_site
from fedunlearn.federation.deployed.frames import Frame, Patience, send_frame

SECONDS_TO_END, SECONDS_BETWEEN_LOOKS = 5.0, 0.05
PATIENCE = Patience(seconds=5.0)
_CREDENTIALS = struct.Struct("3i")  # Linux's struct ucred: pid, uid, gid


@dataclass(frozen=True, kw_only=True)
class Asked:
    """ended: workers that are gone. busy: those that were at work, and end once their task is done."""

    ended: int
    busy: int

    def __str__(self) -> str:
        busy = f"; {self.busy} at work, to end when what they do is done" if self.busy else ""
        return f"{self.ended} {'worker' if self.ended == 1 else 'workers'} ended{busy}"


def end_workers(site: ClientSite, seconds: float = SECONDS_TO_END) -> Asked:
    """Asks every worker of a node to end, and waits for them at most so many seconds, all together.

    No task is lost: a worker ends between two. The node goes on, and its next message starts a worker.
    """
    asked = [_ask(path) for path in sorted(Path(site.work_dir).glob("worker-*.sock"))]
    workers, end = [worker for worker in asked if worker is not None], time.monotonic() + seconds
    while (busy := sum(map(_is_there, workers))) and time.monotonic() < end:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return Asked(ended=len(workers) - busy, busy=busy)


def told_end(site_path: Path) -> str:
    """Does it for a site's YAML; gives what came of it in a line. Raises UserError for a faulty site."""
    site = read_site(site_path, ClientSite)
    return f"client {site.client_id}: {end_workers(site)}"


def _ask(path: Path) -> psutil.Process | None:
    """Gives the process that was asked; None for a socket that a killed worker left, and where one ends by itself at this moment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as there:
        try:
            there.connect(str(path))
            pid, _, _ = _CREDENTIALS.unpack(there.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
            worker = psutil.Process(pid)
            send_frame(there, Frame({"do": "end"}), PATIENCE)
        except (FileNotFoundError, ConnectionError, psutil.NoSuchProcess):
            return None
    return worker


def _is_there(worker: psutil.Process) -> bool:
    """A zombie is not: in a container nobody may collect it."""
    try:
        return worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
