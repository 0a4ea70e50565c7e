"""A run's result from its server: from this machine, and through a stand-in for ssh that runs the command here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedunlearn.errors import UserError
from fedunlearn.sites.fetch import fetch_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "superlink.py"


@pytest.fixture
def site(tmp_path):
    """A server's YAML whose saves hold a finished run, one that has only begun, and one name twice."""
    folder = tmp_path / "it's a site"
    run = folder / "saves" / "unlearn" / "done run"
    for path in (
        run / "adapter",
        run / "rounds" / "0001",
        folder / "saves/unlearn/begun",
        folder / "saves/unlearn/twice",
        folder / "saves/eval/twice",
    ):
        path.mkdir(parents=True)
    (run / "history.jsonl").write_text('{"round": 1}\n')
    (run / "done.json").write_text("{}")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"\x00" * 100_000)
    (run / "rounds" / "0001" / "big").write_bytes(b"x")
    (folder / "saves/unlearn/begun/history.jsonl").write_text("")
    (folder / "server.yaml").write_text("saves_root: saves\n")
    return folder / "server.yaml"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Writes down what it was called with, and runs the last word by a shell, as sshd does."""
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nfor word; do :; done\nprintf \'%s\\n\' "$*" >> {tmp_path}/calls\nexec sh -c "$word"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "calls"


@pytest.mark.parametrize("host", [None, "me@server"])
def test_history_records_and_adapter_come_and_nothing_else(site, stand_in, tmp_path, host):
    got = fetch_run(str(site), "done run", tmp_path / "results", host)
    assert got == tmp_path / "results" / "done run"
    assert sorted(path.name for path in got.iterdir()) == ["adapter", "done.json", "history.jsonl"]
    assert (got / "adapter" / "adapter_model.safetensors").read_bytes() == b"\x00" * 100_000
    assert json.loads((got / "history.jsonl").read_text()) == {"round": 1}
    assert stand_in.exists() == (host is not None)
    assert host is None or all("-- me@server " in call for call in stand_in.read_text().splitlines())


def test_runs_below_the_home_of_the_server_s_machine(site, stand_in, tmp_path, monkeypatch):
    site.write_text("saves_root: ~/saves\n")
    monkeypatch.setenv("HOME", str(site.parent))
    assert (fetch_run(str(site), "done run", tmp_path / "results", "me@server") / "done.json").is_file()


def test_a_run_that_has_only_begun_says_so(site, tmp_path, capsys):
    fetch_run(str(site), "begun", tmp_path / "results")
    assert "no adapter/ yet" in capsys.readouterr().err


def test_a_name_of_two_runs_wants_its_kind(site, tmp_path):
    with pytest.raises(UserError, match="eval/twice and unlearn/twice"):
        fetch_run(str(site), "twice", tmp_path)
    (site.parent / "saves" / "eval" / "twice" / "done.json").write_text("{}")
    assert (fetch_run(str(site), "eval/twice", tmp_path) / "done.json").is_file()


@pytest.mark.parametrize("task", ["done runn", "../unlearn/begun", "/etc", ""])
def test_a_run_that_is_not_there(site, tmp_path, task):
    with pytest.raises(
        UserError, match=r"is no run in .*Known: eval/twice, unlearn/begun, unlearn/done run, unlearn/twice"
    ):
        fetch_run(str(site), task, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_nothing_is_overwritten(site, tmp_path):
    fetch_run(str(site), "done run", tmp_path / "results")
    with pytest.raises(UserError, match="exists already"):
        fetch_run(str(site), "done run", tmp_path / "results")


def test_a_copy_that_breaks_off_leaves_nothing(site, stand_in, tmp_path):
    ssh = stand_in.with_name("bin") / "ssh"
    ssh.write_text(
        ssh.read_text().replace(
            'exec sh -c "$word"',
            'case "$word" in *tar*) sh -c "$word" | head -c 3000; exit 255;; *) exec sh -c "$word";; esac',
        )
    )
    with pytest.raises(UserError, match="cannot be copied"):
        fetch_run(str(site), "done run", tmp_path / "results", "me@server")
    assert not (tmp_path / "results").exists()


def test_a_site_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml cannot be read"):
        fetch_run(str(tmp_path / "none.yaml"), "x", tmp_path)
    (tmp_path / "client.yaml").write_text("client_id: 0\n")
    with pytest.raises(UserError, match="names no saves_root"):
        fetch_run(str(tmp_path / "client.yaml"), "x", tmp_path)


def test_the_script(site, tmp_path):
    words = [sys.executable, str(SCRIPT), "fetch", str(site), "done run", "--to", str(tmp_path / "results")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "results" / "done run")), done.stderr
    assert subprocess.run(words, capture_output=True, timeout=60).returncode == 2
