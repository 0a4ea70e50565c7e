"""The proxy before a SuperLink: a node gets through, the Control and Runtime APIs do not."""

import http.client
import shutil
import ssl
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from federation_here import edit, free_port, start_node, start_server, trial

from fedunlearn.sites.proxy import PROXY_PORT, nginx_conf

DEPLOY = Path(__file__).parents[2] / "deploy"
HOST = "127.0.0.2"  # another address than those of a machine alone, and yet this machine


def test_the_example_is_what_a_trial_federation_gets():
    assert (DEPLOY / "nginx.conf").read_text() == nginx_conf("fed.example", 8000)


@contextmanager
def nginx(folder, conf):
    """nginx as this user, with everything below `folder`."""
    below = "".join(
        f"{kind}_temp_path {folder}/{kind}; " for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    whole = folder / "nginx.conf"
    whole.write_text(
        f"pid {folder}/pid; error_log stderr; daemon off; worker_processes 1;\nevents {{}}\nhttp {{ access_log off; {below}\n{conf}\n}}\n"
    )
    process = subprocess.Popen(["nginx", "-e", "stderr", "-p", str(folder), "-c", str(whole)])
    try:
        yield
    finally:
        process.terminate()
        process.wait(20)


def status(port, ca, method, path):
    connection = http.client.HTTPSConnection(HOST, port, timeout=5, context=ssl.create_default_context(cafile=ca))
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        connection.putheader("content-type", "application/protobuf")
        connection.putheader("content-length", "0")
        connection.endheaders()
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.deployment
@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_only_the_fleet_s_paths_are_published(tmp_path):
    folder, port = trial(tmp_path / "trial", hosts=[HOST], clients=1), free_port()
    server, ca = folder / "server", str(folder / "server" / "ca.crt")
    conf = (
        (server / "nginx.conf")
        .read_text()
        .replace("/etc/fedunlearn", str(server))
        .replace(f"listen {PROXY_PORT}", f"listen {HOST}:{port}")
    )
    running = start_server(folder)
    try:
        with nginx(tmp_path, conf):
            node = start_node(edit(folder / "client0" / "client0.yaml", superlink=f"{HOST}:{port}"))
            node.wait_for("SuperNode ID")
            assert node.end() == 0
            running.wait_for("Deactivated node_id", 5)
            for path in (
                "/v1/control/list-runs",
                "/v1/fleet/../control/list-runs",
                "/v1/fleet/..%2fcontrol/list-runs",
                "/v1/fleet/%2e%2e/control/list-runs",
                "//v1/control/list-runs",
                "/health",
                "/docs",
                "/openapi.json",
            ):
                assert status(port, ca, "POST", path) == 404, path
            assert status(port, ca, "GET", "/v1/fleet/activate-node") == 403
            assert (
                status(port, ca, "POST", "/v1/fleet/activate-node") == 401
            )  # this one the SuperLink itself refuses: there is no signature
    finally:
        assert running.end() == 0
