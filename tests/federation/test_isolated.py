"""launcher.isolate=true: the same bits as local, and only the client that dies, hangs or sends nonsense is lost."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto

from fedunlearn.config.launcher import LocalLauncher, RayLauncher
from fedunlearn.errors import UserError
from fedunlearn.federation.faults import (
    CLIENT_DIED,
    CLIENT_RAISED,
    CLIENT_TIMEOUT,
    REASON_OF_CODE,
    REPLY_TOO_LARGE,
    REPLY_UNREADABLE,
)
from fedunlearn.federation.isolated_grid import Deadlines, IsolatedGrid
from fedunlearn.federation.worker import Charge

# The worker imports this file for make_app: whatever needs torch is imported inside the tests.
LIMIT = 1_000_000
CHARGE = Charge(app="test_isolated:make_app", argument="hello", num_clients=4)
DEADLINES = Deadlines(
    start=60, query=0.5, train=3
)  # a process that ends by itself may take a second, on a busy machine
ISOLATE = "launcher.isolate=true"
PARENT = """
from test_isolated import *
grid = IsolatedGrid(CHARGE, Deadlines(start=60, query=600, train=600), LIMIT)
print(*pids(ask(grid, "echo")), flush=True)
ask(grid, "hang")
"""


def make_app(argument: str) -> ClientApp:
    """Clients that do what a message says."""
    app = ClientApp()

    @app.train()
    @app.query()
    def act(message: Message, context: Context) -> Message:
        told = {"said": argument, "client": context.node_config["partition-id"], "pid": os.getpid()}
        reply = Message(RecordDict({"told": ConfigRecord(told)}), reply_to=message)
        changed = ACTS[message.content["do"]["what"]](reply)
        return reply if changed is None else changed

    return app


def leaves(reply):
    sys.exit("a client that leaves")


def raises(reply):
    raise RuntimeError("no disk")


def refuses(reply):
    raise UserError("row 3 does not fit")


def hangs(reply):
    time.sleep(1000)


def pads(num_bytes):
    def act(reply):
        reply.content["told"]["blob"] = b"x" * num_bytes

    return act


def writes(frame):
    """The code of a client can reach the pipe, whose descriptor is the worker's last argument."""

    def act(reply):
        os.write(int(sys.argv[-1]), frame)

    return act


def answers_with(message_id):
    """Writes a whole reply, to the message of this id (None: to the one that was asked), before the true one goes out."""

    def act(reply):
        early = message_to_proto(reply)
        early.metadata.reply_to_message_id = message_id or early.metadata.reply_to_message_id
        frame = early.SerializeToString()
        writes(len(frame).to_bytes(4, "big") + frame)(reply)

    return act


def writes_half(reply):
    writes((500).to_bytes(4, "big") + b"the rest never comes")(reply)
    hangs(reply)


def closes(reply):
    os.close(int(sys.argv[-1]))
    hangs(reply)


def leaves_a_child_that_holds_the_pipe(reply):
    subprocess.Popen(["sleep", "4"], pass_fds=[int(sys.argv[-1])], start_new_session=True)
    hangs(reply)


def answers_another(reply):
    reply.metadata.__dict__["_reply_to_message_id"] = "another"


def fills_with_nonsense(reply):
    reply.content["told"].__dict__["_data"] = {"x": object()}


ACTS = {
    "echo": lambda reply: None,
    "fill": pads(LIMIT - 1000),
    "die": lambda reply: os._exit(9),
    "die_later": lambda reply: threading.Timer(0.3, os._exit, [3]).start(),
    "leave": leaves,
    "raise": raises,
    "refuse": refuses,
    "hang": hangs,
    "half": writes_half,
    "child": leaves_a_child_that_holds_the_pipe,
    "close": closes,
    "large": pads(LIMIT),
    "huge": writes(b"\xff\xff\xff\xff" + b"\x7f" * 8),
    "garbage": writes(b"\0\0\0\5no pb"),
    "empty": writes(b"\0\0\0\0"),
    "negative": writes(b"\xff\xff\xff\xf0"),
    "stale": answers_with("another"),
    "twice": answers_with(None),
    "nothing": lambda reply: "no message",
    "another": answers_another,
    "nonsense": fills_with_nonsense,
}


def ask(grid, *whats, kind=MessageType.TRAIN):
    """Sends a message to each of the first clients, and gives the replies in order."""
    contents = [RecordDict({"do": ConfigRecord({"what": what})}) for what in whats]
    messages = [Message(content, node, kind) for node, content in zip(grid.get_node_ids(), contents, strict=False)]
    pushed = list(grid.push_messages(messages))
    replies = [reply for _ in pushed for reply in grid.pull_messages(pushed)]
    assert [reply.metadata.reply_to_message_id for reply in replies] == pushed
    return replies


def codes(replies):
    return [reply.error.code if reply.has_error() else 0 for reply in replies]


def pids(replies):
    return [reply.content["told"]["pid"] for reply in replies if reply.has_content()]


def children():
    """The process ids of this process's descendants."""
    return [process.pid for process in psutil.Process().children(recursive=True)]


def reasons(run):
    from helpers_runs import history

    return [
        [(c["client_id"], c["reason"], c["detail"]) for c in line["clients"] if c["reason"]] for line in history(run)
    ]


@pytest.fixture(scope="module")
def grid():
    """One grid for all faults: what one client did must not show in what the next one gets."""
    before = children()
    grid = IsolatedGrid(CHARGE, DEADLINES, LIMIT)
    yield grid
    grid.close()
    assert children() == before


def test_clients_share_one_process_that_is_not_this_one(grid):
    before = children()
    replies = ask(grid, "echo", "echo", "echo", "fill")
    assert [reply.content["told"]["client"] for reply in replies] == [0, 1, 2, 3]
    assert {reply.content["told"]["said"] for reply in replies} == {"hello"}
    assert {*children()} - {*before} == {*pids(replies)} - {os.getpid()}
    assert len({*pids(replies)}) == 1


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("die", CLIENT_DIED, r"the clients' process died \(exit code 9\)"),
        ("leave", CLIENT_DIED, r"died \(exit code 1\)"),
        ("close", CLIENT_TIMEOUT, "no reply within 3 s"),
        ("hang", CLIENT_TIMEOUT, "no reply within 3 s, its process was ended"),
        ("half", CLIENT_TIMEOUT, "no reply within 3 s"),
        ("child", CLIENT_TIMEOUT, "no reply within 3 s"),
        ("large", REPLY_TOO_LARGE, f"a reply of more than {LIMIT} bytes"),
        ("huge", REPLY_TOO_LARGE, f"a reply of more than {LIMIT} bytes"),
        ("garbage", REPLY_UNREADABLE, "the reply cannot be read: DecodeError"),
        ("stale", REPLY_UNREADABLE, "the reply cannot be read: ValueError: it answers another message"),
        ("empty", REPLY_UNREADABLE, "the reply cannot be read: ValueError"),
        ("negative", REPLY_UNREADABLE, "the reply cannot be read: ValueError"),
    ],
)
def test_a_client_that_breaks_its_process_or_the_pipe_is_lost_alone(grid, what, code, said):
    began = time.monotonic()
    replies = ask(grid, "echo", what, "echo", "echo")
    assert codes(replies) == [0, code, 0, 0]
    assert re.search(said, replies[1].error.reason)
    first, second, third = pids(replies)
    assert first != second == third
    assert not psutil.pid_exists(first)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("raise", CLIENT_RAISED, "RuntimeError: no disk"),
        ("refuse", CLIENT_RAISED, "row 3 does not fit"),
        ("nothing", REPLY_UNREADABLE, "a str that does not answer the message"),
        ("another", REPLY_UNREADABLE, "a Message that does not answer the message"),
        ("nonsense", REPLY_UNREADABLE, "Error: "),
    ],
)
def test_a_client_that_raises_or_answers_nonsense_leaves_the_process_as_it_is(grid, what, code, said):
    replies = ask(grid, "echo", what, "echo")
    assert codes(replies) == [0, code, 0]
    assert said in replies[1].error.reason
    assert len({*pids(replies)}) == 1


def test_a_second_reply_is_never_taken_for_the_next_clients(grid):
    """The next one is lost with it where the second came too late to be seen before the next was asked."""
    replies = ask(grid, "twice", "echo", "echo")
    assert codes(replies) in ([0, 0, 0], [0, REPLY_UNREADABLE, 0])
    assert all(r.content["told"]["client"] == client for client, r in enumerate(replies) if r.has_content())
    assert len({*pids(replies)}) == 2


def test_a_worker_that_dies_between_two_messages_costs_no_client(grid):
    (first,) = pids(ask(grid, "die_later"))
    psutil.wait_procs([psutil.Process(first)], timeout=1)
    assert codes(ask(grid, "echo", "echo")) == [0, 0]


def test_a_roll_call_has_its_own_deadline(grid):
    ask(grid, "echo")
    replies = ask(grid, "hang", "die", "echo", kind=MessageType.QUERY)
    assert codes(replies) == [CLIENT_TIMEOUT, CLIENT_DIED, 0]
    assert replies[0].error.reason.startswith("no reply within 0.5 s")


def test_an_interrupt_does_not_reach_the_worker_and_ends_it_here(grid):
    (worker,) = pids(ask(grid, "echo"))
    os.kill(worker, signal.SIGINT)
    assert pids(ask(grid, "echo")) == [worker]
    main = threading.main_thread().ident
    stop = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stop.start()
        with pytest.raises(KeyboardInterrupt):
            ask(grid, "hang")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not psutil.pid_exists(worker)
    assert codes(ask(grid, "echo")) == [0]


def test_no_worker_outlives_its_parent_even_while_a_client_hangs():
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE
    ) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    _, alive = psutil.wait_procs([worker], timeout=5)
    assert alive == []


@pytest.mark.parametrize(
    ("app", "start", "said"),
    [
        ("no_such_module:make", 60, r"before it was ready, the clients' process died \(exit code 1\).*isolate=false"),
        ("json:loads", 60, r"before it was ready, the clients' process died \(exit code 1\)"),
        (CHARGE.app, 0.02, r"launcher\.start_timeout=0\.02: the clients' process was not ready"),
    ],
)
def test_a_worker_that_cannot_be_started_is_told(app, start, said):
    before = children()
    charge = Charge(app=app, argument="[]", num_clients=1)
    grid = IsolatedGrid(charge, Deadlines(start=start, query=1, train=1))
    with pytest.raises(UserError, match=said):
        grid.start()
    grid.close()
    assert children() == before


def test_every_code_has_a_reason():
    assert dict(REASON_OF_CODE) == {
        CLIENT_RAISED: "crashed",
        CLIENT_TIMEOUT: "timeout",
        CLIENT_DIED: "crashed",
        REPLY_TOO_LARGE: "wire_size",
        REPLY_UNREADABLE: "unreadable",
    }


def test_whom_the_rounds_deadline_counts_for():
    assert (LocalLauncher().clock, LocalLauncher(isolate=True).clock, RayLauncher().clock) == (
        "none",
        "client",
        "round",
    )
    assert LocalLauncher(isolate=True).survives_lost_clients


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"start_timeout": 5.0}, r"launcher\.start_timeout=5\.0 has nothing to act on: .* 120\.0 .*launcher\.isolate=true"),
        ({"start_timeout": 0.0, "isolate": True}, r"launcher\.start_timeout=0\.0 must be above 0"),
    ],
)  # fmt: skip
def test_a_start_timeout_that_cannot_act_is_refused(fields, said):
    with pytest.raises(UserError, match=said):
        LocalLauncher(**fields)


def test_isolated_runs_give_the_bits_of_local_and_no_second_base(pocket, saves, monkeypatch):
    from helpers_runs import adapter_bytes, finetune, unlearn

    from fedunlearn.federation import rounds
    from fedunlearn.models import resident

    tuned, unlearned = finetune(pocket, saves, "ft"), None
    unlearned = unlearn(pocket, saves, tuned, "un", "method.retain=kl")
    real, seen, before = rounds.save_checkpoint, [], children()

    def looks(*arguments):
        seen.append((len(resident._held), len({*children()} - {*before})))
        return real(*arguments)

    monkeypatch.setattr(rounds, "save_checkpoint", looks)
    paths = (ISOLATE, f"paths.cache_dir={saves}/cache2")
    assert adapter_bytes(finetune(pocket, saves, "ft2", *paths)) == adapter_bytes(tuned)
    assert adapter_bytes(unlearn(pocket, saves, tuned, "un2", *paths, "method.retain=kl")) == adapter_bytes(unlearned)
    assert seen == [(0, 1)] * 4  # two rounds each: no model here, one worker
    assert children() == before


def test_a_run_goes_on_without_the_owner_that_died_and_the_one_that_hung(pocket, saves, tmp_path):
    """Clients 2 and 3 own forget rows, one batch each: client 2 dies in round 1, client 3 hangs in round 2."""
    from helpers_runs import unlearn

    before, plan = children(), tmp_path / "plan"
    plan.write_text("die ok ok hang")
    scripted = ("method=grad_ascent", "method._target_=helpers_methods.Scripted", f"+method.plan={plan}")
    faulty = (ISOLATE, *scripted, "partition=round_robin", "trainer.federated.round_timeout=4")
    run = unlearn(pocket, saves, None, "un", *faulty)
    died, hung = reasons(run)
    assert died == [(2, "crashed", "the clients' process died (exit code 9)")]
    assert hung == [(3, "timeout", "no reply within 4 s, its process was ended")]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert plan.read_text() == ""
    assert children() == before
