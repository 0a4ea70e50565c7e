"""What deploy/nginx.conf makes of nginx, in fifty lines: passes POST /v1/fleet/... to a SuperLink on loopback, and nothing else.

python tests/fleet_proxy.py HOST PORT SUPERLINK_PORT FOLDER   (FOLDER: with ca.crt, server.crt, server.key)
"""

import http.client
import re
import ssl
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PASSED = re.compile(r"/v1/fleet/[a-z-]+")
OWN = {"connection", "transfer-encoding", "content-length", "host", "date", "server"}


def serve(host: str, port: int, superlink: int, folder: Path) -> None:
    """Serves until it is ended."""
    believed = ssl.create_default_context(cafile=str(folder / "ca.crt"))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            if not PASSED.fullmatch(self.path):
                self._answer(404, {}, b"")
                return
            there = http.client.HTTPSConnection("localhost", superlink, timeout=300, context=believed)
            try:
                passed = {name: value for name, value in self.headers.items() if name.lower() not in OWN}
                there.request("POST", self.path, body=body, headers=passed)
                response = there.getresponse()
                self._answer(response.status, dict(response.getheaders()), response.read())
            finally:
                there.close()

        def _answer(self, status, headers, body):
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in OWN:
                    self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self):
            self._answer(404, {}, b"")

        def log_message(self, *_):
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    server = ThreadingHTTPServer((host, port), Handler)
    server.handle_error = lambda *_: None  # handshakes that are only tried
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
