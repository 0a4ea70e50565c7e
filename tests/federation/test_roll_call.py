"""The roll call: who is let in, who is left out and with which words, and when that ends the run."""

import json
import math
from dataclasses import asdict, replace

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedunlearn.errors import UserError
from fedunlearn.federation import link
from fedunlearn.federation.link import Expectation, roll_call
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.federation.wire import REPLY, RollCallReply, pack_scalars
from fedunlearn.records.rounds import ClientRows
from fedunlearn.records.shape import ClientShape

NODE_OF_0, NODE_OF_1, NODE_OF_2 = 2, 3, 4


def rows(client, owned, forget=0):
    return ClientRows(client_id=client, num_owned=owned, num_forget=forget, num_retain=owned - forget)


EXPECTED = Expectation(
    rows=(rows(0, 10, forget=4), rows(1, 20), rows(2, 30)),
    shapes=(ClientShape(rank=4, lora_alpha=8.0),) * 2 + (ClientShape(rank=2, lora_alpha=4.0),),
    version="1",
    base_fingerprint="b",
    partition_hash="p",
    request_hash="r",
    joins=(1, 1, 1),
    min_clients=1,
)
GOOD = RollCallReply(
    client_id=0, version="1", base_fingerprint="b", partition_hash="p", request_hash="r", num_owned=10, num_forget=4, num_retain=6,
    rank=4, lora_alpha=8.0, joins=1,
)  # fmt: skip
SECOND = replace(GOOD, client_id=1, num_owned=20, num_forget=0, num_retain=20)
THIRD = replace(GOOD, client_id=2, num_owned=30, num_forget=0, num_retain=30, rank=2, lora_alpha=4.0)


def call(*replies, **expected):
    """Holds a roll call with clients that give these replies (a record of ours, any text, a whole content) in node order."""
    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        reply = replies[int(context.node_config["partition-id"])]
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, RecordDict):
            return Message(reply, reply_to=message)
        packed = pack_scalars(reply) if isinstance(reply, RollCallReply) else ConfigRecord({"json": reply})
        return Message(RecordDict({REPLY: packed}), reply_to=message)

    return roll_call(
        LocalGrid(app, len(replies)),
        replace(EXPECTED, **expected),
        timeout=5,
        answer_timeout=math.inf,
        content=RecordDict(),
    )


def test_members_come_in_client_order_whatever_the_nodes_order():
    called = call(THIRD, SECOND, GOOD)
    assert list(called.members) == [0, 1, 2]
    assert [member.node_id for member in called.members.values()] == [NODE_OF_2, NODE_OF_1, NODE_OF_0]
    assert called.members[0].declared.rows.num_forget == 4
    assert called.refused == ()


UNFIT = [
    (replace(SECOND, version="2"), "client 1 has version='2', the server '1'"),
    (replace(SECOND, base_fingerprint="x"), "client 1 has base_fingerprint='x', the server 'b'"),
    (replace(SECOND, quantization="nf4"), "client 1 has quantization='nf4', the server 'none'"),
    (replace(SECOND, partition_hash="x"), "client 1 has partition_hash='x', the server 'p'"),
    (replace(SECOND, client_id=77), "a node says that it is client 77, the partition has 0 to 2"),
    (replace(SECOND, client_id=-1), "a node says that it is client -1, the partition has 0 to 2"),
    (replace(SECOND, num_owned=21), "client 1 declares forget, retain and owned rows (0, 20, 21), by the partition it has (0, 20, 20)"),
    (replace(SECOND, num_forget=-1), "owned rows (-1, 20, 20), by the partition it has (0, 20, 20)"),
    (replace(SECOND, num_forget=5, num_retain=15), "owned rows (5, 15, 20), by the partition it has (0, 20, 20)"),
    (replace(SECOND, num_retain=19), "owned rows (0, 19, 20), by the partition it has (0, 20, 20)"),
    (replace(SECOND, num_owned=10**12), "owned rows (0, 20, 1000000000000), by the partition"),
    (replace(SECOND, rank=8), "client 1 has LoRA rank 8 and alpha 8, by the config 4 and 8"),
    (replace(SECOND, layout="x"), "client 1 makes an adapter of other tensors or shapes than the server's (target_modules, modules_to_save"),
    (replace(SECOND, lora_alpha=16.0), "client 1 has LoRA rank 4 and alpha 16, by the config 4 and 8"),
    (json.dumps({**asdict(SECOND), "num_owned": "x"}), "the reply of node 3 cannot be read: RollCallReply.num_owned='x'"),
    (json.dumps({**asdict(SECOND), "client_id": 10**30}), "the reply of node 3 cannot be read: RollCallReply.client_id='1000000000000000000000000000000' is no int"),
    (json.dumps({**asdict(SECOND), "client_id": 2**63 - 1}), "a node says that it is client 9223372036854775807, the partition has 0 to 2"),
    (json.dumps({**asdict(SECOND), "also": 1}), "the reply of node 3 cannot be read: RollCallReply has no 'also'"),
    ("[]", "the reply of node 3 cannot be read"),
    ("[" * 10**6, "the reply of node 3 cannot be read: RollCallReply is no JSON (RecursionError)"),
    ('{"client_id": ' + "9" * 5000 + "}", "the reply of node 3 cannot be read"),
    (RecordDict(), "the reply of node 3 cannot be read: NoneType where ConfigRecord is wanted"),
    (RecordDict({REPLY: pack_scalars(SECOND), "x": ConfigRecord()}), "the reply of node 3 cannot be read: a record 'x' beside the reply"),
    (RecordDict({REPLY: ArrayRecord()}), "the reply of node 3 cannot be read: ArrayRecord where ConfigRecord is wanted"),
    (RuntimeError("no disk\x1b[2J\nsecond line"), r"node 3 failed: RuntimeError: no disk\x1b[2J"),
    (UserError("row 7 does not fit"), "node 3 failed: row 7 does not fit"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "said"), UNFIT)
def test_a_client_that_does_not_fit_is_left_out_by_name_and_the_others_stay(reply, said):
    called = call(GOOD, reply, THIRD)
    assert list(called.members) == [0, 2]
    told = [fault for fault in called.refused if "is not there" not in fault]
    assert len(told) == 1
    assert told[0].startswith("roll call: ")
    assert said in told[0]
    assert told[0].isprintable()
    assert len(told[0]) < 600


@pytest.mark.parametrize(("reply", "said"), UNFIT)
def test_it_ends_the_run_with_the_same_words_where_that_client_was_needed(reply, said):
    with pytest.raises(UserError, match=r"2 of 3 clients can take part, trainer.federated.min_clients=3 are") as caught:
        call(GOOD, reply, THIRD, min_clients=3)
    assert any(said in fault for fault in caught.value.faults)


def test_a_node_that_tells_whose_it_is_as_it_fails_is_told_once():
    called = call(GOOD, UserError("client 1: no data"), UserError("in client 2: no data"))
    assert called.refused == (
        "roll call: node 3 failed: client 1: no data",
        "roll call: node 4 failed: in client 2: no data",
        "roll call: client 2 is not there",
    )


def test_two_nodes_of_one_id_are_both_left_out_for_nobody_can_tell_which_is_it():
    called = call(GOOD, SECOND, SECOND)
    assert list(called.members) == [0]
    assert "roll call: 2 nodes say that they are client 1" in called.refused
    assert "roll call: client 2 is not there" in called.refused


def test_one_that_borrows_an_id_takes_the_honest_client_out_only_where_it_fits_in_everything():
    """A node that says it is client 1 with other rows is refused for its rows; client 1 stays."""
    called = call(GOOD, SECOND, replace(SECOND, num_owned=30))
    assert list(called.members) == [0, 1]


def test_an_owner_of_forget_rows_that_cannot_take_part_ends_the_run():
    """Nobody else can unlearn its rows, however many others there are."""
    with pytest.raises(UserError, match=r"clients \[0\] own forget rows and cannot take part: nobody else") as caught:
        call(replace(GOOD, version="2"), SECOND, THIRD)
    assert "roll call: client 0 has version='2', the server '1'" in caught.value.faults


def test_all_faults_are_told_at_once_and_each_once():
    with pytest.raises(UserError, match="min_clients=2") as caught:
        call(GOOD, replace(SECOND, version="3", partition_hash="q"), replace(THIRD, version="2"), min_clients=2)
    told = [fault for fault in caught.value.faults if "the server" in fault]
    assert len(told) == len(set(told)) == 3


def test_each_refused_client_is_told_in_the_log(caplog):
    call(GOOD, replace(SECOND, version="2"), THIRD)
    assert "client 1 has version='2', the server '1': the run goes on without" in caplog.text


def test_nodes_that_are_not_there_at_the_deadline_are_left_out_or_end_the_run():
    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        return Message(RecordDict({REPLY: pack_scalars(GOOD)}), reply_to=message)

    called = roll_call(LocalGrid(app, 1), EXPECTED, timeout=0.2, answer_timeout=math.inf, content=RecordDict())
    assert list(called.members) == [0]
    assert called.refused == ("roll call: client 1 is not there", "roll call: client 2 is not there")
    with pytest.raises(UserError, match=r"1 of 3 clients can take part, trainer.federated.min_clients=2 are wanted"):
        roll_call(
            LocalGrid(app, 1),
            replace(EXPECTED, min_clients=2),
            timeout=0.2,
            answer_timeout=math.inf,
            content=RecordDict(),
        )


def test_a_node_that_does_not_answer_is_left_out_after_the_answers_deadline(monkeypatch):
    class Silent(LocalGrid):
        """Node 3 never answers."""

        def pull_messages(self, message_ids):
            waiting = {key for key, message in self._waiting.items() if message.metadata.dst_node_id != NODE_OF_1}
            return super().pull_messages([key for key in message_ids if key in waiting])

    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        said = (GOOD, SECOND, THIRD)[int(context.node_config["partition-id"])]
        return Message(RecordDict({REPLY: pack_scalars(said)}), reply_to=message)

    monkeypatch.setattr(link, "SECONDS_BETWEEN_LOOKS", 0.001)
    called = roll_call(Silent(app, 3), EXPECTED, timeout=60, answer_timeout=0.5, content=RecordDict())
    assert list(called.members) == [0, 2]
    assert "roll call: node 3 did not answer in time" in called.refused


def test_a_grid_that_answers_at_once_has_few_messages_waiting_and_all_are_asked(monkeypatch):
    """600 nodes, 256 at a time: 256, 256, 88; each node's Context names it."""
    seen, waiting = [], []

    class Watched(LocalGrid):
        def push_messages(self, messages):
            pushed = super().push_messages(messages)
            waiting.append(len(self._waiting))
            return pushed

    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        seen.append((message.metadata.dst_node_id, context.node_id, context.node_config["partition-id"]))
        return Message(RecordDict(), reply_to=message)

    grid = Watched(app, 600)
    messages = ((node, Message(RecordDict(), node, MessageType.QUERY)) for node in grid.get_node_ids())
    replies = dict(link.exchange(grid, messages, math.inf))
    assert waiting == [256, 256, 88]
    assert list(replies) == list(range(2, 602))
    assert seen == [(node, node, node - 2) for node in range(2, 602)]


def test_those_never_sent_count_as_silent_at_the_deadline():
    grid = LocalGrid(ClientApp(), 300)
    messages = ((node, Message(RecordDict(), node, MessageType.QUERY)) for node in grid.get_node_ids())
    assert dict(link.exchange(grid, messages, 0.0)) == dict.fromkeys(range(2, 302))


def test_a_reply_that_comes_twice_or_answers_nothing_is_left_unread(caplog):
    class Stammering(LocalGrid):
        """Says everything twice, and something that nobody asked for before it."""

        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            stray = [Message(RecordDict(), reply_to=reply) for reply in replies]  # an answer to an answer
            return [*stray, *replies, *replies]

    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        said = (GOOD, SECOND, THIRD)[int(context.node_config["partition-id"])]
        return Message(RecordDict({REPLY: pack_scalars(said)}), reply_to=message)

    called = roll_call(Stammering(app, 3), EXPECTED, timeout=5, answer_timeout=math.inf, content=RecordDict())
    assert list(called.members) == [0, 1, 2]
    assert called.refused == ()
    assert caplog.text.count("is left unread") == 6
