"""The worker's socket: who is silent, gone, a stranger or a liar costs nobody else anything."""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
from helpers_deployed import client_site, one_node, write_sites

from fedunlearn.federation.deployed import worker as module
from fedunlearn.federation.deployed.frames import (
    LENGTHS,
    MOST_BYTES,
    Frame,
    FrameError,
    Patience,
    receive_frame,
    send_frame,
)
from fedunlearn.federation.deployed.worker import PATIENCE, Worker, _accepted, _check_peer

SOON = Patience(seconds=60.0)
MIB = 2**20


@pytest.fixture(scope="module")
def node(tmp_path_factory, pocket):
    with one_node(tmp_path_factory.mktemp("node"), pocket) as node:
        yield node


def connected(node):
    """A connection to the node's worker."""
    there = socket.socket(socket.AF_UNIX)
    there.connect(str(node.keeper(1).socket_path))
    return there


def test_a_peer_that_says_nothing_holds_others_up_for_a_moment_only(node):
    pid = node.worker.pid
    with connected(node):
        began = time.monotonic()
        assert node.says_the_same(1)
        assert PATIENCE.seconds - 1 < time.monotonic() - began < 30
    assert node.worker.pid == pid


def test_a_peer_that_dribbles_holds_others_up_no_longer(node):
    with connected(node) as there:
        there.sendall(LENGTHS.pack(1000, 0))
        began = time.monotonic()
        while time.monotonic() - began < 30:
            try:
                there.sendall(b"x")
            except OSError:
                break
            time.sleep(0.2)
        assert PATIENCE.seconds - 1 < time.monotonic() - began < 20
    assert node.says_the_same(1)


def test_a_claim_of_8_gib_costs_nothing(node):
    before = node.worker.memory_info().rss
    with connected(node) as there:
        head = b'{"lengths": [%d]}' % MOST_BYTES
        there.sendall(LENGTHS.pack(len(head), MOST_BYTES) + head + bytes(MIB))
        time.sleep(1.0)
        assert node.worker.memory_info().rss < before + 32 * MIB
    with connected(node) as there:
        there.sendall(LENGTHS.pack(2, MOST_BYTES + 1))
        with pytest.raises(FrameError):
            receive_frame(there, SOON)
    assert node.says_the_same(1)
    assert node.worker.memory_info().rss < before + 64 * MIB


def test_an_asker_that_goes_away_while_its_task_runs_ends_the_worker_and_the_next_message_starts_another(node):
    worker, log = node.worker, node.keeper(1).log_path
    told = len(log.read_text())
    for _ in range(50):  # on a busy machine the worker may hear of it only after
        with connected(node) as there:
            send_frame(there, node.frame(1), SOON)
            time.sleep(0.01)
        with suppress(psutil.TimeoutExpired):
            worker.wait(1)
            break
    assert not worker.is_running()
    assert "who asked is gone: this worker ends" in log.read_text()[told:]
    assert node.says_the_same(1)


def test_an_asker_that_is_gone_before_it_is_heard_costs_nobody_anything(node):
    worker = node.worker
    worker.suspend()
    with connected(node) as there:
        send_frame(there, node.frame(1), SOON)
    worker.resume()
    assert node.says_the_same(1)
    assert node.worker == worker


@pytest.mark.parametrize(
    ("head", "told"),
    [
        ({}, "a worker answers query, train, evaluate, not 'None'"),
        ({"do": "answer"}, "not 'None'"),
        ({"do": "answer", "kind": ["train"]}, "not \"['train']\""),
        ({"do": "dance", "kind": "train"}, "a worker answers query, train, evaluate"),
        ({"do": "answer", "kind": "train"}, "run 'None' is unknown to this node"),
        ({"do": "answer", "kind": "train", "folder": "../1"}, "run '../1' is unknown to this node"),
        ({"do": "answer", "kind": "train", "folder": "9" * 300}, "is unknown to this node"),
        ({"do": "answer", "kind": "train", "folder": "\u0661"}, "is unknown to this node"),
        ({"do": "answer", "kind": "train", "folder": "1"}, "no content"),
        ({"do": "answer", "kind": "train", "folder": "1", "content": {"request": ["blob", 0]}}, "names no blob"),
        ({"do": "answer", "kind": "train", "folder": "1", "content": {}}, "NoneType where ConfigRecord is wanted"),
    ],
)
def test_what_a_worker_does_not_do_is_told(node, head, told):
    pid = node.worker.pid
    with connected(node) as there:
        send_frame(there, Frame(head), SOON)
        code, reason = receive_frame(there, SOON).head["error"]
    assert code == 1001
    assert told in reason
    assert node.worker.pid == pid


def test_a_task_that_came_behind_the_word_to_end_is_done(node):
    worker = node.worker
    worker.suspend()
    with connected(node) as first, connected(node) as second:
        send_frame(first, Frame({"do": "end"}), SOON)
        send_frame(second, node.frame(1), SOON)
        worker.resume()
        assert "content" in receive_frame(second, SOON).head
    worker.wait(20)
    assert node.says_the_same(1)


def test_a_policy_that_was_changed_holds_from_the_next_message_on(node):
    worker, policy = node.worker, node.path.parent / "policy.yaml"
    before = policy.read_text()
    assert node.says_the_same(1)
    policy.write_text(before.replace("max_steps: 1000", "max_steps: 1"))
    try:
        assert "this client's policy allows 1 (policy: max_steps)" in node.answer(1).error.reason
    finally:
        policy.write_text(before)
    assert node.says_the_same(1)
    assert node.worker == worker


# --- users


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_served_even_where_the_rights_let_it_in(node):
    code = (
        "import os, socket, sys; os.chdir(sys.argv[1]); os.setgid(65534); os.setuid(65534); there = socket.socket(socket.AF_UNIX); "
        "there.settimeout(30); there.connect(sys.argv[2]); print(there.recv(1))"
    )
    path = node.keeper(1).socket_path
    words = [sys.executable, "-c", code, str(path.parent), path.name]
    shut = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert "PermissionError" in shut.stderr
    try:
        path.parent.chmod(0o711)
        path.chmod(0o666)
        began = time.monotonic()
        served = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert served.stdout == "b''\n", served.stderr
        assert time.monotonic() - began < PATIENCE.seconds  # at once, and not for its silence
    finally:
        path.parent.chmod(0o700)
        path.chmod(0o600)
    assert "user 65534 asked, this worker serves user 0 alone" in node.keeper(1).log_path.read_text()
    assert node.says_the_same(1)


def test_a_peer_of_another_user_is_refused(monkeypatch):
    here, there = socket.socketpair()
    with here, there:
        _check_peer(there)
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
        with pytest.raises(FrameError, match=f"user {mine} asked, this worker serves user {mine + 1} alone"):
            _check_peer(there)


# --- its end


@pytest.fixture
def idle(tmp_path, pocket):
    """A worker, in this process, that nobody has asked."""
    (path,) = write_sites(tmp_path, pocket, clients=1)
    site = client_site(path)
    soon = replace(site, worker=replace(site.worker, idle_minutes=0.002))
    return Worker(site=soon, site_path=path, address=tmp_path / "w.sock")


def test_who_comes_while_the_socket_is_taken_away_is_heard(idle, monkeypatch):
    """An asker that has connected just before the end gets its answer."""
    late, real = socket.socket(socket.AF_UNIX), module._accepted
    said = []

    def accepted(door, seconds):
        found = real(door, seconds)
        if found is None and not said:  # nobody came; now somebody does
            late.connect(str(idle.address))
            send_frame(late, Frame({"do": "answer", "kind": "train", "folder": "7"}), SOON)
            said.append(True)
        return found

    monkeypatch.setattr(module, "_accepted", accepted)
    idle.serve()
    assert "run '7' is unknown" in receive_frame(late, SOON).head["error"][1]
    late.close()
    assert not idle.address.exists()


def test_a_worker_may_idle_longer_than_a_socket_knows(idle, monkeypatch):
    """Ten million minutes are allowed; a socket cannot be told more than 24 days."""
    monkeypatch.setattr(module, "LONGEST_TIMEOUT", 0.02)
    with idle._listening() as door:
        began = time.monotonic()
        assert _accepted(door, 0.1) is None
        assert time.monotonic() - began >= 0.1
    monkeypatch.undo()
    with idle._listening() as door, socket.socket(socket.AF_UNIX) as late:
        late.connect(str(idle.address))
        _accepted(door, 6e8).close()


def test_a_worker_ends_when_it_is_asked_to(node):
    worker = node.worker
    with connected(node) as there:
        send_frame(there, Frame({"do": "end"}), SOON)
    assert worker.wait(30) == 0
    assert not node.keeper(1).socket_path.exists()
    assert node.says_the_same(1)
