"""A trial federation on loopback, and servers that answer as a real one, or just not quite."""

import http.server
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import psutil
import yaml

from fedunlearn.sites.authority import Authority, Validity
from fedunlearn.sites.certificates import Federation, make_federation

SCRIPTS = Path(__file__).parents[1] / "scripts"
SOON = 10.0
"""Seconds from a node's start to its message; a healthy machine needs one."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def trial(folder: Path, **changes) -> Path:
    """A federation whose data and model folders are there, empty; each node at a port of its own that is free."""
    for name in ("data", "model"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    wanted = {
        "hosts": ["localhost", "127.0.0.1"],
        "clients": 2,
        "days": 2,
        "models": {"pocket": str(folder / "model")},
        "benchmark": "tofu",
        "data": str(folder / "data"),
        "port": free_port(),
        **changes,
    }
    make_federation(folder, Federation(**wanted))
    for path in folder.glob("client[0-9]*/client*.yaml"):
        edit(path, listen=f"127.0.0.1:{free_port()}")
    return folder


def edit(path: Path, **changes) -> Path:
    """Sets keys of a YAML; None takes a key away."""
    data = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    return path


def valid(begins_in_hours: float, ends_in_hours: float) -> Validity:
    now = datetime.now(UTC)
    return Validity(begins=now + timedelta(hours=begins_in_hours), ends=now + timedelta(hours=ends_in_hours))


def server_files(folder: Path, authority: Authority, hosts: list[str], validity: Validity | None = None):
    """Writes ca.crt, server.crt and server.key."""
    folder.mkdir(parents=True, exist_ok=True)
    certificate, key = authority.server(hosts, validity)
    for name, content in (("ca.crt", authority.certificate), ("server.crt", certificate), ("server.key", key)):
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)


@contextmanager
def answering(files: Path | None, *, hours_ahead: float = 0.0, body: bytes = b"{}", status: int = 400) -> Iterator[int]:
    """An HTTP server in a thread, in TLS with server.crt and server.key of `files`; its clock may be off. Gives its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def date_time_string(self, timestamp=None):
            return format_datetime(datetime.now(UTC) + timedelta(hours=hours_ahead), usegmt=True)

        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if files:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(files / "server.crt", files / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # refused handshakes are what is tested
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class Running:
    """A script and what it writes. before: what its command line begins with, to run it on another host. folder: where it works."""

    def __init__(self, log, *words, before=(), folder=None):
        self.log = log
        self.began = time.monotonic()
        words = [*before, sys.executable, *map(str, words)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=folder)

    def text(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, said, seconds=60):
        end = time.monotonic() + seconds
        while said not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, self.text()
            time.sleep(0.05)

    def refused(self, seconds=SOON):
        """Its last line; it must have ended with code 2 in that many seconds of its start."""
        assert self.process.wait(seconds) == 2, self.text()
        assert time.monotonic() - self.began < seconds
        return self.text().splitlines()[-1]

    def end(self, number=signal.SIGTERM):
        """Ends it; nothing that it started may be left."""
        if self.process.poll() is None:
            below = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(number)
            self.process.wait(30)
            _, left = psutil.wait_procs(below, timeout=5)
            assert not left
        return self.process.returncode


def start_server(folder):
    running = Running(folder / "server.log", SCRIPTS / "superlink.py", "start", folder / "server" / "server.yaml")
    try:
        running.wait_for("the SuperLink is up", 120)
    except AssertionError:
        running.end()
        raise
    return running


def start_node(site):
    return Running(site.with_suffix(".log"), SCRIPTS / "supernode.py", site)
