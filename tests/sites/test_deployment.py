"""Real processes on loopback, with TLS and node keys: who gets in, who is kept out and told why, and what a killed SuperLink costs."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from federation_here import SCRIPTS, Running, edit, free_port, start_node, start_server, trial
from helpers_sites import server_files, valid

from fedunlearn.config.sites import ServerSite, make_work_dir, read_site
from fedunlearn.sites.authority import Authority
from fedunlearn.sites.commands import flower_home, superlink_command
from fedunlearn.sites.running import Child

pytestmark = pytest.mark.deployment


def another(folder, name, **changes):
    """A site of its own with client 0's key."""
    made = folder.with_name(name)
    shutil.copytree(folder, made, ignore=shutil.ignore_patterns("work", "*.log"))
    return edit(made / "client0.yaml", listen=f"127.0.0.1:{free_port()}", **changes)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    folder = trial(tmp_path_factory.mktemp("deployed") / "with a space")
    server = start_server(folder)
    yield folder, server
    assert server.end() == 0


@pytest.fixture(scope="module")
def node(federation):
    folder, _ = federation
    node = start_node(folder / "client0" / "client0.yaml")
    node.wait_for("SuperNode ID")
    yield node
    assert node.end() == 0


def test_a_good_node_connects(federation, node):
    _, server = federation
    server.wait_for("Activated node_id")
    assert "client0.pub asked whether it may connect: yes" in server.text()


def test_an_unknown_key(federation, tmp_path):
    folder, server = federation
    trial(tmp_path)
    site = another(folder / "client0", "unknown", key=str(tmp_path / "client0" / "node.key"))
    assert "does not know key=" in start_node(site).refused()
    server.wait_for("a key that is not in client_keys was refused", 5)


def test_no_key(federation):
    folder, _ = federation
    assert "key is missing" in start_node(another(folder / "client0", "keyless", key=None)).refused()


def test_another_authority(federation, tmp_path):
    folder, _ = federation
    trial(tmp_path)
    site = another(folder / "client0", "believing", ca=str(tmp_path / "client0" / "ca.crt"))
    assert "was not signed by the authority" in start_node(site).refused()


def test_plaintext_to_tls(federation):
    folder, _ = federation
    site = another(folder / "client0", "plain", ca=None, key=None, insecure=True)
    assert "does not answer in plaintext" in start_node(site).refused()


def test_a_key_that_is_in_use(federation, node):
    folder, server = federation
    refused = start_node(another(folder / "client0", "double")).refused(20)  # most of it is Flower's own start
    assert "another node is connected with the same key" in refused
    server.wait_for("client0.pub was refused: another is connected", 5)
    assert node.process.poll() is None


def test_a_port_in_use(federation):
    folder, _ = federation
    again = Running(folder / "again.log", SCRIPTS / "superlink.py", "start", folder / "server" / "server.yaml")
    assert "cannot be listened at (Address already in use)" in again.refused()


def test_an_expired_certificate(tmp_path):
    folder = trial(tmp_path)
    authority = Authority("ours", valid(-100, 100))
    server_files(folder / "server", authority, ["localhost", "127.0.0.1"], valid(-50, -1))
    shutil.copy(folder / "server" / "ca.crt", folder / "client0" / "ca.crt")
    refused = Running(folder / "server.log", SCRIPTS / "superlink.py", "start", folder / "server" / "server.yaml")
    assert "expired at" in refused.refused()
    path = folder / "server" / "server.yaml"
    site = read_site(path, ServerSite)
    make_work_dir(site.work_dir)
    unchecked = Child(superlink_command(site, path))
    try:
        end = time.monotonic() + 60
        while not any("Uvicorn running" in line for line in unchecked.lines):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert "its certificate expired at" in start_node(folder / "client0" / "client0.yaml").refused()
    finally:
        unchecked.end()


def test_a_key_that_is_taken_from_the_folder_is_shut_out(tmp_path):
    """Both the node that is connected when the server comes back, and one that starts later."""
    folder = trial(tmp_path)
    site = folder / "client1" / "client1.yaml"
    server = start_server(folder)
    connected = start_node(site)
    connected.wait_for("SuperNode ID")
    server.end()
    (folder / "server" / "client_keys" / "client1.pub").unlink()
    server = start_server(folder)
    try:
        assert "no longer in client_keys was shut out" in server.text()
        assert "client0.pub may connect" not in server.text()  # known from before
        assert "no longer takes this node's signature" in connected.refused(120)
        assert "does not know key=" in start_node(site).refused()
    finally:
        assert server.end(signal.SIGINT) == 130
        connected.end()


APP = {
    "pyproject.toml": """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "asking"
version = "0.1.0"
license = "MIT"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "test"
[tool.flwr.app.components]
serverapp = "asking.apps:server"
clientapp = "asking.apps:client"
""",
    "asking/__init__.py": "",
    "asking/apps.py": """
import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()


@client.query()
def answer(message, context):
    told = ConfigRecord({"site": context.node_config["site"], "pid": context.node_config["supernode-pid"]})
    return Message(RecordDict({"told": told}), reply_to=message)


@server.main()
def ask(grid, context):
    log = Path(os.environ["FEDUNLEARN_SITE"]).with_name("asked.log")
    for asked in range(4):
        nodes = list(grid.get_node_ids())
        replies = list(grid.send_and_receive([Message(RecordDict({"asked": ConfigRecord({"n": asked})}), node, "query") for node in nodes]))
        told = [dict(reply.content["told"]) if reply.has_content() else reply.error for reply in replies]
        with log.open("a") as file:
            file.write(f"{asked} {told}\\n")
""",
}


def test_a_killed_superlink_does_not_take_the_run(federation, node, tmp_path):
    """The ServerApp has its site's path, the ClientApp the node's, and all four questions are answered though the SuperLink dies after the first."""
    folder, server = federation
    for name, text in APP.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    asked = folder / "server" / "asked.log"
    environment = {**os.environ, "FLWR_HOME": str(flower_home(str(folder / "server" / "work")))}
    flwr = str(Path(sys.executable).with_name("flwr"))
    submitted = subprocess.run(
        [flwr, "run", str(tmp_path), "site"], env=environment, timeout=60, capture_output=True, text=True
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    lines_of(asked, 1, 60)
    superlink = next(
        process
        for process in psutil.Process(server.process.pid).children()
        if any("flower-superlink" in word for word in process.cmdline())
    )
    superlink.kill()
    lines = lines_of(asked, 4, 180)
    assert "SuperLink: it was killed by signal 9" in server.text()
    site = str(folder / "client0" / "client0.yaml")
    assert all(repr({"site": site, "pid": node.process.pid}) in line for line in lines)


def lines_of(path, count, seconds):
    end = time.monotonic() + seconds
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.1)
    return path.read_text().splitlines()
