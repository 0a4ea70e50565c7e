"""Ten thousand hostile requests: a client answers with an error or does what it was asked, of parts with the right hash, and stays as it was."""

import json

import pytest
from flwr.app import MessageType
from helpers_clients import check, same
from helpers_fuzz import examples
from helpers_mutations import mutated
from helpers_oracle import scalars_of
from helpers_recorded import CLIENTS, node_of
from hypothesis import assume, given
from hypothesis import strategies as st

from fedunlearn.federation.local_grid import context_of

FEW, LIMIT = 50, 1_000_000


def is_long(content) -> bool:
    """Whether a request asks for so many epochs that a client would honestly work on it for minutes."""
    data = scalars_of(content.get("request")) or {}
    asked = [data.get(key) for key in ("epochs", "rounds", "parts")]
    if not all(type(value) in (int, float) and abs(value) < 1e300 for value in asked):
        return False
    if not asked[2] or not 0 < asked[0] <= 1e6:
        return False
    return FEW < asked[0] * abs(asked[1]) / abs(asked[2]) <= LIMIT


@pytest.mark.parametrize("kind", [MessageType.QUERY, MessageType.TRAIN, MessageType.EVALUATE])
def test_a_request_as_it_was_gives_the_reply_as_it_was(client, kind):
    for number in range(CLIENTS):
        reply = client.put_back().answer(kind, number, client.recorded.asked[kind, number])
        assert same(reply, client.recorded.said[kind, number])


@pytest.mark.parametrize(("kind", "share"), [("train", 0.25), ("evaluate", 0.06), ("query", 0.025)])
def test_a_hostile_request_gives_an_error_or_what_was_asked_for(client, kind, share):
    recorded, found = client.recorded, {}
    others = [*recorded.asked.values(), *recorded.said.values()]

    @examples(share)
    @given(st.data())
    def holds(data):
        number = data.draw(st.integers(0, CLIENTS - 1))
        content = data.draw(mutated(recorded.asked[kind, number], others))
        assume(content is not None and not is_long(content))
        became = check(client, kind, number, content)
        found[became] = found.get(became, 0) + 1
        if kind != MessageType.QUERY and became != "error":
            after = client.put_back().answer(kind, number, recorded.asked[kind, number])
            assert same(after, recorded.said[kind, number]), "the next sound request was answered otherwise"

    holds()
    assert found
    for number in range(CLIENTS):
        assert same(client.put_back().answer(kind, number, recorded.asked[kind, number]), recorded.said[kind, number])


def test_every_error_leaves_the_client_as_it_was(client):
    """The next sound request, after each field in turn was spoilt."""
    recorded = client.recorded
    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        request = scalars_of(recorded.asked[kind, 0]["request"])
        for key in request:
            for value in (None, -1, "x", ["x"], float("nan"), 10**400):
                spoilt = type(recorded.asked[kind, 0])({**recorded.asked[kind, 0], "request": type(recorded.asked[kind, 0]["request"])({"json": json.dumps({**request, key: value})})})  # fmt: skip
                check(client, kind, 0, spoilt)
        assert same(client.put_back().answer(kind, 0, recorded.asked[kind, 0]), recorded.said[kind, 0])


def test_nodes_are_those_of_the_grid():
    assert [context_of(node_of(k), CLIENTS).node_config["partition-id"] for k in range(CLIENTS)] == list(range(CLIENTS))
