"""Hostile frames at a worker's socket: each costs its sender its answer; the worker lives, keeps its memory, and answers the next honest message with the same bits."""

import json
import socket

import pytest
from helpers_deployed import one_node
from helpers_fuzz import check_told, examples
from helpers_mutations import RAW, TEXTS, scalars
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.federation.deployed.frames import (
    LENGTHS,
    LONGEST_HEAD,
    MOST_BYTES,
    ClosedError,
    FrameError,
    Patience,
    receive_frame,
    unpack_content,
)
from fedunlearn.federation.faults import REASON_OF_CODE
from fedunlearn.federation.wire import one_line

SOON, MIB = Patience(seconds=60.0), 2**20
LENGTHS_THAT_LIE = (0, 1, 15, 16, 1000, LONGEST_HEAD, LONGEST_HEAD + 1, 2**31, MOST_BYTES, MOST_BYTES + 1, 2**63, 2**64 - 1)  # fmt: skip
KEYS = ("do", "folder", "kind", "content", "lengths")


@pytest.fixture(scope="module")
def node(place, pocket):
    folder = place / "node"  # a socket's path is short
    folder.mkdir()
    with one_node(folder, pocket) as node:
        yield node


@st.composite
def hostile_bytes(draw, frame) -> bytes:
    """The bytes of an honest frame, spoilt in one to three ways."""
    head = {**frame.head, "lengths": [len(blob) for blob in frame.blobs]}
    blobs, text, claim = list(frame.blobs), None, None
    for _ in range(draw(st.sampled_from((1, 1, 2, 3)))):
        act = draw(st.sampled_from(("key", "key", "drop", "add", "content", "content", "blob", "blob", "text", "claim", "lengths")))  # fmt: skip
        if act == "key":
            head[draw(st.sampled_from(KEYS))] = draw(st.one_of(scalars, st.sampled_from(("query", "evaluate", "2", "1"))))  # fmt: skip
        elif act == "drop":
            head.pop(draw(st.sampled_from(KEYS)), None)
        elif act == "add":
            head[draw(st.sampled_from((*TEXTS, "__class__")))] = draw(scalars)
        elif act == "content" and isinstance(head.get("content"), dict):
            name = draw(st.sampled_from((*head["content"], *TEXTS)))
            entry = draw(st.one_of(scalars, st.tuples(st.sampled_from(("text", "blob", "pickle", 0)), st.one_of(st.integers(-2, 5), scalars))))  # fmt: skip
            head["content"] = {**head["content"], name: entry}
        elif act == "blob" and blobs:
            at = draw(st.integers(0, len(blobs) - 1))
            spoilt = bytearray(blobs[at][: draw(st.one_of(st.just(len(blobs[at])), st.integers(0, len(blobs[at]))))])
            for _ in range(draw(st.integers(0, 3)) if spoilt else 0):
                spoilt[draw(st.integers(0, len(spoilt) - 1))] ^= draw(st.integers(1, 255))
            blobs[at] = bytes(spoilt)
            if draw(st.booleans()):
                head["lengths"] = [len(blob) for blob in blobs]
        elif act == "text":
            text = draw(st.one_of(st.sampled_from(RAW).map(str.encode), st.binary(max_size=40), st.just(b'{"lengths":' + b"[" * 200_000)))  # fmt: skip
        elif act == "claim":
            claim = draw(st.tuples(st.sampled_from(LENGTHS_THAT_LIE), st.sampled_from(LENGTHS_THAT_LIE)))
        else:
            head["lengths"] = draw(st.one_of(scalars, st.lists(st.one_of(st.integers(-2, 2**64), scalars), max_size=4)))
    text = json.dumps(head).encode() if text is None else text
    raw = LENGTHS.pack(*(claim or (len(text), sum(map(len, blobs))))) + text + b"".join(blobs)
    return raw[: draw(st.integers(0, len(raw)))] if draw(st.integers(0, 3)) == 0 else raw


def is_whole(raw: bytes) -> bool:
    """Whether a reader has all that it was promised, or need not wait for it."""
    if len(raw) < LENGTHS.size:
        return False
    head, body = LENGTHS.unpack(raw[: LENGTHS.size])
    if head > LONGEST_HEAD or body > MOST_BYTES:
        return True
    if len(raw) < LENGTHS.size + head:
        return False
    try:
        said = json.loads(raw[LENGTHS.size : LENGTHS.size + head])
        lengths = said["lengths"]
        adds_up = all(type(length) is int and length >= 0 for length in lengths) and sum(lengths) == body
    except (ValueError, KeyError, TypeError, RecursionError):
        return True  # refused as it is
    return not adds_up or len(raw) >= LENGTHS.size + head + body


def asks_to_end(raw: bytes) -> bool:
    """Whether a frame is the one that ends a worker, said by accident."""
    return b'"do": "end"' in raw


def became(node, raw: bytes) -> str:
    """What a worker makes of these bytes: `cut`, `closed`, `error` or `content`."""
    with socket.socket(socket.AF_UNIX) as there:
        there.settimeout(60)
        there.connect(str(node.keeper(1).socket_path))
        try:
            there.sendall(raw)
            if not is_whole(raw):
                return "cut"
            answer = receive_frame(there, SOON)
        except (ClosedError, ConnectionError):
            return "closed"
    if "error" in answer.head:
        code, reason = answer.head["error"]
        assert code in REASON_OF_CODE
        check_told(one_line(reason))
        return "error"
    assert "reply" in unpack_content(answer.head["content"], answer.blobs)
    return "content"


def test_a_hostile_frame_costs_its_sender_its_answer(node):
    frames = [node.frame(run, kind) for run, kind in ((1, "train"), (2, "train"))]
    assert node.says_the_same(1)
    worker, found = node.worker, {}
    before = worker.memory_info().rss

    @examples(0.15)
    @given(st.data())
    def holds(data):
        raw = data.draw(hostile_bytes(data.draw(st.sampled_from(frames))))
        assert not asks_to_end(raw)
        how = became(node, raw)
        found[how] = found.get(how, 0) + 1
        assert worker.is_running(), "the worker ended"
        assert node.says_the_same(1), "the next honest message was answered otherwise"

    holds()
    assert {"cut", "closed", "error"} <= set(found), found
    assert node.worker == worker
    assert worker.memory_info().rss < before + 64 * MIB


def test_an_honest_frame_is_answered(node):
    """The oracle's other side: spoilt in no way, a frame gives content."""
    frame = node.frame(2)
    text = json.dumps({**frame.head, "lengths": [len(blob) for blob in frame.blobs]}).encode()
    raw = LENGTHS.pack(len(text), sum(map(len, frame.blobs))) + text + b"".join(frame.blobs)
    assert [is_whole(raw[:end]) for end in (0, 15, 16, len(raw) - 1, len(raw))] == [False, False, False, False, True]
    assert became(node, raw) == "content"
    with pytest.raises(FrameError):
        unpack_content({"x": ["text", 1]}, ())
