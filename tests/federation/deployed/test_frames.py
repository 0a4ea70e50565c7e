"""Frames: what goes in comes out; what is none is told as one kind of error, in time, and for no more memory than arrived."""

import json
import socket
import threading
import tracemalloc

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedunlearn.federation.deployed import frames
from fedunlearn.federation.deployed.frames import (
    CHUNK,
    LENGTHS,
    LONGEST_HEAD,
    MOST_BYTES,
    ClosedError,
    Frame,
    FrameError,
    Patience,
    pack_content,
    receive_frame,
    send_frame,
    unpack_content,
)

SOON = Patience(seconds=10.0)


@pytest.fixture
def pair():
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def passed(frame, here, there):
    """The frame as the other side receives it."""
    sender = threading.Thread(target=send_frame, args=(here, frame, SOON))
    sender.start()
    received = receive_frame(there, SOON)
    sender.join(10)
    return received


def received(raw, pair):
    """What becomes of these bytes, after which the sender is gone."""
    here, there = pair
    here.sendall(raw)
    here.shutdown(socket.SHUT_WR)
    return receive_frame(there, SOON)


def raw_frame(head, *blobs, body=None):
    text = head if isinstance(head, bytes) else json.dumps({"lengths": [len(blob) for blob in blobs], **head}).encode()
    return LENGTHS.pack(len(text), sum(map(len, blobs)) if body is None else body) + text + b"".join(blobs)


@pytest.mark.parametrize("blobs", [(), (b"",), (b"x",), (b"", b"ab", b""), (bytes(3 * CHUNK + 1), b"\xff")])
def test_a_frame_comes_out_as_it_went_in(pair, blobs):
    head = {"do": "answer", "deep": [{"é": None}], "number": 2**60, "text": "two\nlines \ud800"}
    got = passed(Frame(head, blobs), *pair)
    assert got == Frame(head, blobs)


def test_several_frames_follow_each_other(pair):
    for number in range(3):
        assert passed(Frame({"n": number}, (bytes([number]),)), *pair) == Frame({"n": number}, (bytes([number]),))


REFUSED = {
    "no JSON": b"{'a': 1}",
    "no JSON (": b"\xff\xfe",
    "no JSON object": b"[]",
    "nested too deeply": b'{"a":' * 60_000,
    "nested too deeply ": b"[" * 500_000,
    "do not add up": b"{}",
    "do not add up ": b'{"lengths": [1]}',
    "do not add up  ": b'{"lengths": [true]}',
    "do not add up   ": b'{"lengths": [-1, 1]}',
    "do not add up    ": b'{"lengths": {"0": 0}}',
    "do not add up     ": b'{"lengths": [0.0]}',
    "do not add up      ": b'{"lengths": null}',
}


@pytest.mark.parametrize(("told", "head"), REFUSED.items())
def test_what_is_no_frame_is_told(pair, told, head):
    sender = threading.Thread(target=pair[0].sendall, args=(raw_frame(head),))
    sender.start()
    with pytest.raises(FrameError, match=told.strip().replace("(", r"\(")):
        receive_frame(pair[1], SOON)
    sender.join(10)


@pytest.mark.parametrize(("head", "body"), [(LONGEST_HEAD + 1, 0), (2, MOST_BYTES + 1), (2**64 - 1, 2**64 - 1)])
def test_more_than_is_read_is_refused_before_it_comes(pair, head, body):
    with pytest.raises(FrameError, match=f"a frame of {head} and {body} bytes, at most {LONGEST_HEAD} and"):
        received(LENGTHS.pack(head, body), pair)


def test_what_the_other_side_would_not_read_is_not_sent(pair):
    with pytest.raises(FrameError, match=f"at most {LONGEST_HEAD}"):
        send_frame(pair[0], Frame({"text": "x" * LONGEST_HEAD}), SOON)


@pytest.mark.parametrize("keep", [0, 1, 15, 16, 20, -1])
def test_a_frame_that_is_cut_is_told(pair, keep):
    with pytest.raises(ClosedError, match="closed after"):
        received(raw_frame({"a": 1}, b"blob")[:keep], pair)


def test_a_claim_of_8_gib_costs_nothing(pair):
    claim = LENGTHS.pack(len(head := json.dumps({"lengths": [MOST_BYTES]}).encode()), MOST_BYTES) + head + b"x"
    tracemalloc.start()
    try:
        with pytest.raises(ClosedError):
            received(claim, pair)
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20 + CHUNK
    finally:
        tracemalloc.stop()


def test_a_peer_that_says_nothing_is_waited_for_so_long_and_no_longer(pair):
    with pytest.raises(TimeoutError, match=r"0 bytes of a frame passed in 0\.1 s"):
        receive_frame(pair[1], Patience(seconds=0.1))


def test_a_peer_that_dribbles_is_no_better_than_one_that_says_nothing(pair):
    """A byte now and then begins no new time."""
    here, there = pair
    over = threading.Event()

    def dribble():
        for byte in raw_frame({"a": "x" * 1000}):
            if over.wait(0.02):
                return
            here.sendall(bytes([byte]))

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match="bytes of a frame"):
            receive_frame(there, Patience(seconds=0.3, pace=10 * 2**20))
    finally:
        over.set()
        thread.join(10)


def test_a_long_frame_has_the_time_that_its_bytes_take(pair):
    """0.2 s and a second for each half MiB: 2 MiB in pieces, over a second, are not late."""
    here, there = pair
    raw = raw_frame({}, bytes(2 * 2**20))

    def send():
        for start in range(0, len(raw), 2**18):
            over.wait(0.12)
            here.sendall(raw[start : start + 2**18])

    over = threading.Event()
    thread = threading.Thread(target=send)
    thread.start()
    got = receive_frame(there, Patience(seconds=0.2, pace=2**19))
    thread.join(10)
    assert len(got.blobs[0]) == 2 * 2**20


def test_a_peer_that_does_not_read_is_not_waited_for_without_end(pair):
    with pytest.raises(TimeoutError):
        send_frame(pair[0], Frame({}, (bytes(64 * 2**20),)), Patience(seconds=0.2))


def test_times_longer_than_a_socket_knows_are_kept(pair):
    """A policy may give a task ten million seconds; a socket cannot be told more than 24 days."""
    send_frame(pair[0], Frame({"a": 2}), Patience(seconds=1e7))
    assert receive_frame(pair[1], Patience(seconds=1e7)).head == {"a": 2}


def test_who_waits_longer_than_a_socket_can_waits_again(pair, monkeypatch):
    monkeypatch.setattr(frames, "LONGEST_TIMEOUT", 0.05)
    threading.Timer(0.3, pair[0].sendall, [raw_frame({"a": 1})]).start()
    assert receive_frame(pair[1], SOON).head == {"a": 1}


def blob(data, stype="safetensors"):
    return ArrayRecord({"blob": Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)})


CONTENT = RecordDict({"adapter": blob(b"ab"), "empty": blob(b""), "reply": ConfigRecord({"json": '{"é": "\\n"}'}), "text": ConfigRecord({"json": ""})})  # fmt: skip


def test_content_comes_out_as_it_went_in(pair):
    described, blobs = pack_content(CONTENT)
    got = passed(Frame({"content": described}, blobs), *pair)
    assert unpack_content(got.head["content"], got.blobs) == CONTENT
    assert unpack_content({}, ()) == RecordDict()


def test_texts_do_not_stand_in_the_json():
    """However long a text is, reading the JSON takes no more memory."""
    described, blobs = pack_content(RecordDict({"request": ConfigRecord({"json": "[" * 10_000})}))
    assert len(json.dumps(described)) < 100
    assert blobs == [b"[" * 10_000]


@pytest.mark.parametrize(
    "record",
    [
        ConfigRecord({"json": 1}),
        ConfigRecord({"json": "x", "y": 1}),
        ConfigRecord(),
        ArrayRecord(),
        MetricRecord({"json": 1}),
        blob(b"x", stype="numpy.ndarray"),
        ArrayRecord({**blob(b"x"), "y": blob(b"y")["blob"]}),
        ArrayRecord({"x": blob(b"x")["blob"]}),
    ],
)
def test_records_of_another_form_are_refused_by_name(record):
    with pytest.raises(FrameError, match="record 'odd' is neither a text nor a safetensors blob"):
        pack_content(RecordDict({"fine": ConfigRecord({"json": "x"}), "odd": record}))


@pytest.mark.parametrize(
    "entry",
    [0, "text", None, [], ["text"], ["text", 2], ["text", -1], ["text", True], ["text", 0.0], ["text", "0"], ["pickle", 0], ["text", 0, 0], {"text": 0}, [["text"], 0]],
)  # fmt: skip
def test_content_that_names_no_blob_is_refused_by_name(entry):
    with pytest.raises(FrameError, match="record 'odd' names no blob"):
        unpack_content({"odd": entry}, (b"x", b"y"))


def test_a_text_that_is_none_is_refused():
    with pytest.raises(FrameError, match="record 'odd' is no UTF-8"):
        unpack_content({"odd": ["text", 0]}, (b"\xff",))


@pytest.mark.parametrize("described", [None, [], "x", 1])
def test_content_of_another_form_is_refused(described):
    with pytest.raises(FrameError, match="no content"):
        unpack_content(described, ())
