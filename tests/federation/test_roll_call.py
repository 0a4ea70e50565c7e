"""The roll call: who is let in, and what the server says of those who are not."""

import json
from dataclasses import asdict, replace

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedunlearn.errors import UserError
from fedunlearn.federation.link import Expectation, roll_call
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.federation.wire import REPLY, RollCallReply, pack_scalars

EXPECTED = Expectation(num_owned=(10, 20), version="1", base_fingerprint="b", partition_hash="p")
GOOD = RollCallReply(
    client_id=0, version="1", base_fingerprint="b", partition_hash="p", num_owned=10, num_forget=4, num_retain=6
)


def call(*replies):
    """Holds a roll call with clients that give these replies (a record of ours, or any text) in node order."""
    app = ClientApp()

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        reply = replies[int(context.node_config["partition-id"])]
        if isinstance(reply, Exception):
            raise reply
        packed = pack_scalars(reply) if isinstance(reply, RollCallReply) else ConfigRecord({"json": reply})
        return Message(RecordDict({REPLY: packed}), reply_to=message)

    return roll_call(LocalGrid(app, len(replies)), EXPECTED, timeout=5)


def second(**changes):
    return replace(GOOD, client_id=1, num_owned=20, **changes)


def test_members_come_in_client_order_whatever_the_nodes_order():
    members = call(second(), GOOD)
    assert list(members) == [0, 1]
    assert [member.node_id for member in members.values()] == [3, 2]
    assert members[1].declared.rows.num_forget == 4


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (second(version="2"), "client 1 has version='2', the server '1'"),
        (second(base_fingerprint="x"), "client 1 has base_fingerprint='x', the server 'b'"),
        (second(partition_hash="x"), "client 1 has partition_hash='x', the server 'p'"),
        (replace(GOOD, client_id=0), "two nodes say that they are client 0"),
        (replace(GOOD, client_id=77), "a node says that it is client 77, the partition has 0 to 1"),
        (replace(GOOD, client_id=1, num_owned=21), r"declares forget, retain and owned rows \(4, 6, 21\), the partition gives it 20"),
        (second(num_forget=-1), r"rows \(-1, 6, 20\)"),
        (second(num_retain=19), r"rows \(4, 19, 20\)"),
        (json.dumps({**asdict(second()), "num_owned": "x"}), "the reply of node 3 cannot be read: RollCallReply.num_owned='x'"),
        ("[]", "the reply of node 3 cannot be read"),
        (RuntimeError("no disk"), "node 3 failed: RuntimeError: no disk"),
    ],
)  # fmt: skip
def test_a_client_that_does_not_fit_is_refused(reply, message):
    with pytest.raises(UserError, match=message):
        call(GOOD, reply)


def test_all_faults_are_told_at_once_and_each_once():
    with pytest.raises(UserError, match="version") as caught:
        call(replace(GOOD, version="2"), second(version="3", partition_hash="q"))
    assert len(caught.value.faults) == 3


def test_too_few_nodes_end_the_roll_call_at_its_deadline():
    with pytest.raises(UserError, match=r"1 nodes are there after 0\.2 s"):
        roll_call(LocalGrid(ClientApp(), 1), EXPECTED, timeout=0.2)
