"""Files of a trial server, and servers that answer as a real one, or just not quite."""

import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

from fedunlearn.sites.authority import Authority, Validity


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
def answering(
    files: Path | None,
    *,
    hours_ahead: float = 0.0,
    date: str = "",
    body: bytes = b"{}",
    status: int = 400,
    closes: bool = False,
) -> Iterator[int]:
    """An HTTP server in a thread, in TLS with server.crt and server.key of `files`; its clock may be off, or say `date`. closes: it answers nothing. Gives its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def date_time_string(self, timestamp=None):
            return date or format_datetime(datetime.now(UTC) + timedelta(hours=hours_ahead), usegmt=True)

        def do_HEAD(self):
            if closes:
                self.close_connection = True
                return
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
