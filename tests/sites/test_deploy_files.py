"""The examples in deploy/: they name scripts, folders and options that are there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedunlearn.sites.proxy import PROXY_PORT

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_script_that_takes_its_words(unit):
    words = re.search(r"^ExecStart=(.*)$", unit.read_text(), re.M)[1].split()
    script = ROOT / Path(words[1]).relative_to("/opt/fedunlearn")
    done = subprocess.run(
        [sys.executable, str(script), *words[2:], "--print"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "cannot be read (No such file or directory)" in done.stderr  # so far it was understood


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_finds_no_fault_in_a_unit(unit, tmp_path):
    text = unit.read_text().replace("/opt/fedunlearn/.venv/bin/python", sys.executable).replace("User=fedunlearn\n", "")
    path = tmp_path / unit.name.replace("@", "@client0")
    path.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not [line for line in done.stderr.splitlines() if unit.stem.rstrip("@") in line], done.stderr


def test_the_compose_file_fits_a_trial_federation():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert sorted(services) == ["client0", "client1", "client2", "proxy", "server"]
    for name, service in services.items():
        assert "ports" not in service  # the nodes are on the same network; the SuperLink itself is on loopback
        if name == "proxy":
            continue
        script, *words = service["command"]
        assert (ROOT / script).is_file()
        assert words[-1] == f"/site/{name}.yaml"
        assert f"./trial/{name}:/site" in service["volumes"]
    assert services["proxy"]["network_mode"] == "service:server"
    mounted = {volume.split(":")[1] for volume in services["proxy"]["volumes"]}
    conf = (DEPLOY / "nginx.conf").read_text()
    assert set(re.findall(r" (/etc/fedunlearn/[a-z.]+);", conf)) <= mounted
    assert f"listen {PROXY_PORT} ssl" in conf


def test_the_image_holds_what_it_copies():
    text, ignored = (DEPLOY / "Dockerfile").read_text(), (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    assert copied
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
