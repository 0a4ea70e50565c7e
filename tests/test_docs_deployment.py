"""docs/deployment.md: its commands are taken, in the order they stand they work, and what it quotes is what the code says."""

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from federation_here import Running
from helpers_hosts import SERVER, Hosts, why_none
from helpers_machines import IN_THE_SHELL, PLACED, ROOT, Line, Machines, checkout, lines_of

from fedunlearn.config.launcher import SuperlinkLauncher
from fedunlearn.config.sites import ClientSite, ServerSite, WorkerLimits, read_site
from fedunlearn.config.trainer import FederatedArgs
from fedunlearn.doors.compose import compose
from fedunlearn.sites.keys import client_keys, names_by_key, node_key, public_bytes
from fedunlearn.sites.proxy import PROXY_PORT
from fedunlearn.sites.tls import certificate_faults, in_memory

TEXT = (ROOT / "docs" / "deployment.md").read_text()
LINES = list(lines_of(TEXT))
DOORS = [line for line in LINES if line.words[:2] in (("python", "src/fed_train.py"), ("python", "src/eval.py"))]
SCRIPTS = [line for line in LINES if line.words[0] == "python" and line not in DOORS]
SHORT = ("trainer.federated.num_rounds=2", "trainer.args.num_train_epochs=1", "eval.max_rows=2")
"""The recipes' numbers are for a result; here it is the way that is tried."""


def test_there_is_no_command_of_a_kind_that_is_not_tried():
    kinds = {line.words[0] for line in LINES if not line.words[0].startswith("FLWR_HOME=")}
    assert kinds == {"python", "scp", *IN_THE_SHELL, *PLACED}
    assert len(DOORS) == 5
    assert len(SCRIPTS) >= 12


@pytest.mark.parametrize("line", DOORS, ids=lambda line: line.words[-1])
def test_a_door_s_command_composes(line: Line):
    named = [word.partition("=")[2] for word in line.words if word.startswith("--config-name=")]
    overrides = [word for word in line.words[2:] if not word.startswith("--")]
    composed = compose(ROOT / "configs", (named or ["eval.yaml"])[0], overrides)
    assert isinstance(composed.run.launcher, SuperlinkLauncher) == (line.words[1] == "src/fed_train.py")


def test_a_script_s_options_are_taken(tmp_path):
    """Without the files that are named each says so; argparse would say `usage`."""
    home = checkout(tmp_path / "home")
    for line in SCRIPTS:
        words = [sys.executable, *line.words[1:]]
        done = subprocess.run(words, cwd=home, capture_output=True, text=True, timeout=60)
        made = line.words[1] == "scripts/make_certificates.py"
        shutil.rmtree(home / line.words[3], ignore_errors=made) if made else None
        assert done.returncode == (0 if made else 2), done.stderr
        assert made or (done.stderr.startswith("error: ") and "usage" not in done.stderr)


def is_offline(line: Line) -> bool:
    """Whether it wants no server."""
    return bool(line.machine) and (
        line.words[0] in ("scp", *IN_THE_SHELL) or line.words[1:2] == ("scripts/make_certificates.py",)
    )


def test_certificates_are_renewed_and_clients_come_and_go(tmp_path, pocket):
    machines = Machines(tmp_path, pocket)
    offline = [line for line in LINES if is_offline(line)]
    renewed = next(place for place, line in enumerate(offline) if "renewed" in line.text)
    for line in offline[:renewed]:
        machines.run(line)
    server = machines.there("fed.example") / "federation" / "server"
    assert not (machines.there("fed.example") / "federation" / "client0").exists()
    home = tmp_path / "a.example" / "client0"
    old = in_memory(str(server / "server.crt"), str(server / "server.key"))

    def faults(shake):
        return certificate_faults(shake, ["fed.example", "localhost"], str(home / "ca.crt"), "it")

    assert faults(old) == []
    assert read_site(home / "client0.yaml", ClientSite).superlink == f"fed.example:{PROXY_PORT}"
    for line in offline[renewed:]:
        machines.run(line)
        if line.words[0] == "scp" and "both.crt" in line.text:
            assert faults(old) == []
    new = in_memory(str(server / "server.crt"), str(server / "server.key"))
    assert faults(new) == []
    keys = client_keys(read_site(server / "server.yaml", ServerSite).client_keys)
    assert [key.name for key in keys] == ["client0.pub", "client2.pub"]
    third = read_site(machines.there("c.example") / "client2" / "client2.yaml", ClientSite)
    assert third.client_id == 2
    assert names_by_key(keys)[public_bytes(node_key(third.key).public_key())] == "client2.pub"


def test_renewed_certificates_are_others_than_the_old_ones(tmp_path, pocket):
    """Else the test above would say nothing: with the old authority alone the new certificate is not believed."""
    machines = Machines(tmp_path, pocket)
    for line in LINES:
        if line.words[1:2] == ("scripts/make_certificates.py",) and line.machine:
            machines.run(line)
    here = machines.there("fed.example")
    new = in_memory(str(here / "renewed/server/server.crt"), str(here / "renewed/server/server.key"))
    assert certificate_faults(new, ["fed.example"], str(here / "federation/server/ca.crt"), "it")


def said_by_the_code() -> list[str]:
    """Every string of the source, with what is put in left out."""
    files = (ROOT / "src" / "fedunlearn").rglob("*.py")
    return [
        node.value
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_what_the_table_quotes_is_what_the_code_says():
    rows = TEXT.partition("| it says |")[2].splitlines()[2:]
    quoted = [text for row in rows for text in re.findall(r"`(.*?)`", row.split(" | ")[0])]
    assert len(quoted) > 40
    said = said_by_the_code()
    assert [text for text in quoted if not any(text in one for one in said)] == []


def test_defaults_that_are_told_are_those_of_the_code():
    launcher = SuperlinkLauncher(address="localhost:8000", root_certificates="ca.crt")
    federated, worker = FederatedArgs.__dataclass_fields__, WorkerLimits()
    for key, value in (
        ("launcher.start_timeout", launcher.start_timeout),
        ("trainer.federated.roll_call_timeout", federated["roll_call_timeout"].default),
        ("trainer.federated.round_timeout", federated["round_timeout"].default),
        ("worker.start_timeout", worker.start_timeout),
    ):
        assert f"`{key}` ({value:g} s" in TEXT
    assert f"`worker.idle_minutes` ({worker.idle_minutes:g})" in TEXT
    assert f"{PROXY_PORT}, TCP" in TEXT


def taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.deployment
def test_the_trial_on_one_machine(tmp_path_factory):
    """Every command as it stands but for fewer rounds; with a loopback of its own where that can be had."""
    home = checkout(tmp_path_factory.mktemp("t") / "h")
    lines, running, told = [line for line in LINES if not line.machine], [], ""
    with ExitStack() as stack:
        before = [] if why_none() else stack.enter_context(Hosts(0)).at(0)
        if not before and any(map(taken, (8000, 9094, 9095))):
            pytest.skip(
                "ports 8000, 9094 and 9095 of this machine are in use, and it lets nobody have a loopback of his own"
            )
        stack.callback(lambda: [one.end() for one in reversed(running)])
        for number, line in enumerate(lines):
            words = [*line.words[1:], *(SHORT if line.words[1] == "src/fed_train.py" else ())]
            one = Running(home / f"{number}.log", *words, before=before, folder=home)
            if line.stays:
                running.append(one)
                one.wait_for("the SuperLink is up" if "superlink" in line.words[1] else "SuperNode ID", 120)
            else:
                assert one.process.wait(400) == 0, one.text()
                told += one.text()
        assert "client 0: 1 worker ended" in told
        assert "client1-data: 100 of 200 rows" in told
        assert (home / "results" / "npo" / "adapter" / "adapter_model.safetensors").is_file()
        assert (home / "trial" / "server" / "saves" / "finetune" / "ft" / "done.json").is_file()
        assert [one.end() for one in reversed(running)] == [0, 0, 0]


ASK = """
import http.client, socket, ssl, sys
host, ca = sys.argv[1:]
with socket.socket() as probe:
    probe.settimeout(5)
    print(probe.connect_ex((host, 8000)) != 0)
for path in ("/v1/control/list-runs", "/v1/runtime/pull-task-input", "/v1/fleet/activate-node"):
    there = http.client.HTTPSConnection(host, 8443, timeout=5, context=ssl.create_default_context(cafile=ca))
    there.request("POST", path, body=b"", headers={"content-type": "application/protobuf"})
    print(there.getresponse().status)
"""


@pytest.mark.deployment
@pytest.mark.skipif("why_none()", reason="no network namespaces here")
def test_three_machines_from_nothing(tmp_path_factory, pocket):
    """Each a network of its own, the clients' homes with nothing of the server's; a proxy like deploy/nginx.conf stands between them."""
    with Hosts(2) as hosts:
        machines = Machines(tmp_path_factory.mktemp("m"), pocket, hosts)
        proxy = None
        try:
            for line in LINES[: LINES.index(next(line for line in DOORS if line.machine)) + 1]:
                if line.text.startswith("sudo nginx"):
                    proxy = start_proxy(machines)
                elif line.machine not in ("fed.example", "a.example", "b.example") or line.words[0] in PLACED:
                    continue
                elif line.stays:
                    machines.start(line)
                elif line in DOORS:
                    assert "result: finetune/ft" in machines.run(line, *SHORT).stdout
                else:
                    machines.run(line)
            assert asked_from_a(machines) == ["True", "404", "404", "401"]
            assert_flower_s_own_commands(machines)
            assert machines.end() == [0, 0, 0]
        finally:
            machines.end()
            if proxy is not None:
                proxy.end()


def start_proxy(machines: Machines) -> Running:
    files = machines.there("fed.example") / "federation" / "server"
    words = (ROOT / "tests" / "fleet_proxy.py", SERVER, PROXY_PORT, 8000, files)
    return Running(machines.folder / "proxy.log", *words, before=machines.hosts.at(0))


def asked_from_a(machines: Machines) -> list[str]:
    """Whether a client's machine finds port 8000 closed, and what the proxy answers it for Control, Runtime and Fleet without a key."""
    ca = machines.folder / "a.example" / "client0" / "ca.crt"
    words = [*machines.hosts.at(1), sys.executable, "-c", ASK, SERVER, str(ca)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.split()


def assert_flower_s_own_commands(machines: Machines) -> None:
    """What stands with FLWR_HOME; the last, which stops a run, is tried on one that has ended."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run_id = "none"
    for line in (line for line in LINES if line.words[0].startswith("FLWR_HOME=")):
        words = [*machines.hosts.at(0), "sh", "-c", line.text.replace("RUN_ID", run_id)]
        environment = {**os.environ, "PATH": path, "COLUMNS": "300", "NO_COLOR": "1"}
        done = subprocess.run(words, cwd=machines.there("fed.example"), env=environment, capture_output=True, text=True, timeout=90)  # fmt: skip
        said = done.stdout + done.stderr
        assert (done.returncode == 0) == (" stop " not in line.text), said
        assert "No such" not in said
        if " flwr ls " in line.text:
            (run_id,) = re.findall(r"\d{15,}", said)
        elif "supernode" in line.text:
            assert said.count("online") == 2
        elif " log " in line.text:
            assert 'fedunlearn> {"done"' in said
