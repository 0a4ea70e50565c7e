"""Finding, starting and ending a node's worker: one for all who ask, each in turn, and every way in which there is none told in words."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
from helpers_deployed import client_site, end_workers, one_node, workers_of, write_sites

from fedunlearn.errors import UserError
from fedunlearn.federation.deployed import keeper as module
from fedunlearn.federation.deployed.frames import Frame
from fedunlearn.federation.deployed.keeper import GoneError, Keeper, LateError

ASKED = Frame({"do": "answer", "folder": "9", "kind": "train", "content": {}})
UNKNOWN = "run '9' is unknown to this node"


@pytest.fixture(scope="module")
def node(tmp_path_factory, pocket):
    with one_node(tmp_path_factory.mktemp("node"), pocket) as node:
        yield node


@pytest.fixture
def keeper(tmp_path, pocket):
    """A keeper that has never started a worker."""
    (path,) = write_sites(tmp_path, pocket, clients=1)
    yield Keeper(site=client_site(path), site_path=path, key="k" * 16, base=pocket.model, supernode=os.getpid())
    end_workers([path])


def at_once(*calls):
    """What becomes of calls that are made at the same time."""
    gate, became = threading.Barrier(len(calls)), [None] * len(calls)

    def make(place, call):
        gate.wait()
        try:
            became[place] = call()
        except Exception as error:
            became[place] = error

    threads = [threading.Thread(target=make, args=(place, call)) for place, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return became


def with_limits(keeper, **limits):
    return replace(keeper, site=replace(keeper.site, worker=replace(keeper.site.worker, **limits)))


# --- taking turns


def test_two_runs_at_once_on_one_base_take_turns_and_both_end_right(node):
    before = node.worker.pid
    assert not node.says_the_same(1, node.answer(2))  # they are not alike
    replies = at_once(*(lambda run=run: node.answer(run) for run in (1, 2, 1, 2, 2, 1)))
    assert [node.says_the_same(run, reply) for run, reply in zip((1, 2, 1, 2, 2, 1), replies, strict=True)] == [True] * 6  # fmt: skip
    assert node.worker.pid == before


def test_messages_that_come_at_once_start_one_worker(node):
    node.keeper(1).end()
    assert workers_of([node.path]) == []
    replies = at_once(*(lambda run=run: node.answer(run) for run in (1, 2, 1)))
    assert [node.says_the_same(run, reply) for run, reply in zip((1, 2, 1), replies, strict=True)] == [True] * 3
    assert node.worker.is_running()  # one, and not three


def test_who_waits_for_its_turn_ends_nobodys_work(node):
    """A message whose turn does not come is late by itself; the task before it goes on."""
    keeper = with_limits(node.keeper(1), start_timeout=0.1)
    with module._alone(keeper.socket_path.with_suffix(".lock"), 1.0):  # as one who is at work holds it
        before = node.worker
        with pytest.raises(LateError, match=r"other tasks kept this node's worker busy for 0\.3 s, nothing was done"):
            keeper.ask(ASKED, 0.2)
    assert node.worker == before
    assert node.says_the_same(1)


def test_a_turn_ends_with_the_process_that_has_it(node):
    lock = node.keeper(1).socket_path.with_suffix(".lock")
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('has it', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"has it\n"
        threading.Timer(0.3, other.kill).start()
        assert node.says_the_same(1)


def test_a_worker_that_takes_nobody_is_late_and_ended(node):
    """One that hangs, with so many waiting that no more can connect."""
    import socket

    keeper, worker = node.keeper(1), node.worker
    worker.suspend()
    waiting = []
    try:
        while True:
            one = socket.socket(socket.AF_UNIX)
            waiting.append(one)
            one.setblocking(False)
            one.connect(str(keeper.socket_path))
    except BlockingIOError:
        pass
    began = time.monotonic()
    with pytest.raises(LateError, match=r"no answer within 0\.5 s, the worker was ended"):
        keeper.ask(ASKED, 0.5)
    assert time.monotonic() - began < 10
    assert not worker.is_running()
    for one in waiting:
        one.close()
    assert node.says_the_same(1)


# --- starting


def test_a_worker_answers_without_a_run(keeper):
    answer = keeper.ask(ASKED, 60.0)
    assert UNKNOWN in answer.head["error"][1]
    keeper.end()
    assert workers_of([keeper.site_path]) == []
    keeper.end()  # nothing to end is no fault


def test_a_work_dir_too_long_for_a_socket_is_refused_in_words(keeper, tmp_path):
    for length, fits in ((74, True), (75, False), (200, False)):
        work_dir = str(tmp_path) + "/" + "x" * (length - len(str(tmp_path)) - 1)
        long = with_limits(replace(keeper, site=replace(keeper.site, work_dir=work_dir)), start_timeout=0.01)
        with pytest.raises(UserError) as caught:
            long.ask(ASKED, 1.0)
        told = f"work_dir={work_dir!r} is too long a path for a unix socket ({length} bytes): choose one of at most 74 bytes"
        assert (str(caught.value) == told) == (not fits)


def test_a_work_dir_that_others_can_enter_is_refused(keeper):
    os.chmod(keeper.site.work_dir, 0o755)
    with pytest.raises(UserError, match="can be entered by others"):
        keeper.ask(ASKED, 1.0)
    assert not keeper.log_path.exists()


def test_a_worker_that_is_not_ready_in_time_is_ended_and_told(keeper):
    late = with_limits(keeper, start_timeout=0.05)
    with pytest.raises(UserError, match=r"worker\.start_timeout=0\.05: this node's worker was not ready .* raise it"):
        late.ask(ASKED, 60.0)
    assert workers_of([keeper.site_path]) == []


def test_a_worker_that_ends_before_it_is_ready_is_told_with_its_last_words(keeper):
    keeper.log_path.write_text("words of another\n")
    keeper.site_path.write_text(keeper.site_path.read_text().replace("client_id: 0", "client_id: -7"))
    with pytest.raises(
        UserError, match=r"this node's worker ended before it was ready: .*client_id=-7 must be at least 0"
    ):
        keeper.ask(ASKED, 60.0)


def test_the_last_words_are_those_of_this_worker(keeper):
    keeper.log_path.write_text("words of another\n")
    keeper._record.write_text(json.dumps({"pid": 1, "needed": 0, "told": keeper.log_path.stat().st_size}))
    assert keeper._last_words() == "none"
    with keeper.log_path.open("a") as log:
        log.write("x" * 5000 + "\nits own\n\n")
    assert keeper._last_words() == "its own"


def test_a_worker_that_dies_is_gone_with_its_last_words(keeper):
    keeper.ask(ASKED, 60.0)
    (worker,) = workers_of([keeper.site_path])
    worker.suspend()
    threading.Timer(0.5, worker.kill).start()
    with pytest.raises(GoneError, match="the worker died before it answered; its last words: "):
        keeper.ask(ASKED, 60.0)
    assert UNKNOWN in keeper.ask(ASKED, 60.0).head["error"][1]  # another is started


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": 1}', '{"pid": "x", "needed": 0, "told": 0}'])
def test_a_record_that_is_none_is_no_worker(keeper, text):
    keeper._record.write_text(text)
    assert keeper._running() is None
    keeper.end()
    assert not keeper._record.exists()


def test_a_number_that_is_anothers_by_now_is_not_ended(keeper):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        keeper._record.write_text(json.dumps({"pid": other.pid, "needed": 0, "told": 0}))
        keeper.end()
        assert psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE
        other.kill()


# --- memory


def test_a_second_base_without_room_is_refused_with_the_memory_it_needs(node, monkeypatch):
    keeper, size = replace(node.keeper(1), key="f" * 16), sum(f.stat().st_size for f in node.keeper(1).base.glob("*.safetensors"))  # fmt: skip
    monkeypatch.setattr(module, "ROOM", 2**50 / size)
    with pytest.raises(
        UserError, match=r"this node has [\d.]+ GiB of memory left and this base needs about 1048576\.0 GiB: wait until"
    ):
        keeper.ask(ASKED, 60.0)
    assert not keeper.log_path.exists()  # nothing was started
    assert node.says_the_same(1)  # the first is not bothered


def test_what_other_workers_will_yet_take_is_not_there(keeper):
    """A worker loads its base with its first message: until then its memory looks free."""
    assert keeper._promised() == 0
    first = replace(keeper, key="a" * 16)
    first.ask(ASKED, 60.0)
    record = json.loads(first._record.read_text())
    assert record["needed"] == keeper._checked_memory()
    first._record.write_text(json.dumps({**record, "needed": 2**50}))
    assert 0.99 * 2**50 < keeper._promised() <= 2**50
    with pytest.raises(UserError, match=r"this node has 0\.0 GiB of memory left"):
        keeper.ask(ASKED, 60.0)
    first.end()
    assert keeper._promised() == 0
