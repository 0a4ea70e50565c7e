"""Requests that were found, or thought of, before there was a rule against them: each gives an error, and costs neither memory nor time."""

import json
import time

import pytest
from flwr.app import ConfigRecord, MessageType, RecordDict
from helpers_clients import check
from helpers_fuzz import room_for, size_of
from helpers_oracle import scalars_of

from fedunlearn.federation.wire import pack_released
from fedunlearn.records.requests import ReleasedRow

QUICK = 5.0
TASKS = {
    "a million epochs of a million rounds": ({"epochs": 1e6, "rounds": 10**6}, "steps in one round, at most 1000000"),
    "epochs beyond all": ({"epochs": 1e300}, "no task has epochs=1e+300"),
    "no epoch": ({"epochs": 0.0}, "no task has epochs=0.0"),
    "epochs that are no number": ({"epochs": float("nan")}, "no task has epochs=nan"),
    "part 0": ({"part": 0}, "no task has part 0 of 1 of 1 rounds"),
    "part 2 of 1": ({"part": 2}, "no task has part 2 of 1 of 1 rounds"),
    "no rounds": ({"rounds": 0}, "no task has part 1 of 1 of 0 rounds"),
    "a rate below 0": ({"lr_scale": -1.0}, "no task has lr_scale=-1.0"),
    "a rate without end": ({"lr_scale": float("inf")}, "no task has lr_scale=inf"),
    "mu that is no number": ({"mu": float("nan")}, "no task has mu=nan"),
    "a radius below 0": ({"radius": -1.0}, "no task has radius=-1.0"),
    "memory that is no number": ({"memory": {"x": float("nan")}}, "no task has memory.x=nan"),
    "another role": ({"role": "admin"}, "'admin' is not a valid Role"),
    "idle": ({"role": "idle"}, "nothing to do as idle"),
    "somebody else": ({"client_id": 1}, "client 0 got the task of client 1"),
}
NAMES = ("adapter", "sidecar", "reference", "reference_sidecar", "keep")
ODD = ("../../../x", "", "0" * 63, "0" * 65, "A" * 64, "0" * 64 + "/x")


def with_fields(content, **changes) -> RecordDict:
    """The request with other scalars."""
    data = {**scalars_of(content["request"]), **changes}
    return RecordDict({**content, "request": ConfigRecord({"json": json.dumps(data)})})


def refusal(client, kind, content) -> str:
    """Why client 0 refuses a message, at once."""
    began = time.monotonic()
    with room_for(size_of(content)):
        reply = client.put_back().answer(kind, 0, content)
    assert time.monotonic() - began < QUICK
    assert reply.has_error()
    assert not client.worked
    return reply.error.reason


@pytest.fixture
def task(client):
    return client.recorded.asked[MessageType.TRAIN, 0]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_cannot_be_is_refused(client, task, name):
    changes, said = TASKS[name]
    reply = client.put_back().answer(MessageType.TRAIN, 0, with_fields(task, **changes))
    assert said in reply.error.reason


@pytest.mark.parametrize("name", ODD)
def test_a_part_s_name_is_a_hash_and_nothing_else(client, task, name):
    for key in NAMES:
        named = [*scalars_of(task["request"])[key], name]
        assert f"a part is named {name!r}, which is no sha256" in refusal(
            client, MessageType.TRAIN, with_fields(task, **{key: named})
        )
    wanted = client.recorded.asked[MessageType.EVALUATE, 0]
    assert "no sha256" in refusal(client, MessageType.EVALUATE, with_fields(wanted, keep=[name]))


def test_rows_below_0_are_none(client):
    wanted = client.recorded.asked[MessageType.EVALUATE, 0]
    assert "no evaluation has rows=-1" in refusal(client, MessageType.EVALUATE, with_fields(wanted, rows=-1))


def test_one_block_ten_thousand_times_is_no_side_car(client):
    """A name is 67 bytes, and its block as long as it likes: side by side they would take memory without end."""
    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        content = client.recorded.asked[kind, 0]
        request = scalars_of(content["request"])
        named = (request["sidecar"] or request["adapter"])[:1]
        said = refusal(client, kind, with_fields(content, sidecar=named * 10_000))
        assert said.endswith("a side-car block 10000 times, in a run of 2 rounds")
        assert check(client, kind, 0, with_fields(content, sidecar=named * 3)) == "done"


def test_rows_of_others_are_read_only_where_the_protocol_releases_them(client, task):
    lent = RecordDict({**task, "released": pack_released([ReleasedRow(1, "a question", "an answer")])})
    reply = client.put_back().answer(MessageType.TRAIN, 0, lent)
    if client.recorded.turn.released:
        assert not reply.has_error()
    else:
        assert "released rows, in a run whose protocol releases none" in reply.error.reason


@pytest.mark.parametrize("text", ["[" * 100_000, "1", '[["1", "q", "a"]]', '[[true, "q", "a"]]', '[[1, "q"]]', "[[1, 2, 3]]", '[[1, "q", "a", 4]]'])  # fmt: skip
def test_released_rows_are_a_number_and_two_texts(client, task, text):
    lent = RecordDict({**task, "released": ConfigRecord({"json": text})})
    assert "released rows" in refusal(client, MessageType.TRAIN, lent)
