"""What crosses a worker's socket: one small JSON object and the blobs it names by place: safetensors and UTF-8 texts; never pickle.

A frame is two lengths (8 bytes each, big endian), the JSON and the blobs one after the other. Knows no torch.
"""

import json
import math
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

LENGTHS = struct.Struct(">QQ")
LONGEST_HEAD = 2**20
"""Bytes of JSON: names and numbers, for texts are blobs. JSON takes up to thirty times its length once it is read, blobs nothing more."""
MOST_BYTES = 2**33
CHUNK = 2**20
LONGEST_TIMEOUT = 2e6
"""Seconds that a socket can be told to wait at most; who waits longer waits again."""
TEXT, BLOB = "text", "blob"
DEEPEST = "the JSON is nested too deeply"


class FrameError(ValueError):
    """A frame, or what it holds, is not what was agreed."""


class ClosedError(FrameError):
    """The other side went away before a frame was whole."""


@dataclass(frozen=True)
class Frame:
    """head: JSON values; blobs: bytes that it refers to by place."""

    head: Mapping[str, Any]
    blobs: Sequence[bytes] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a frame may take: seconds, and beside them a second for every `pace` bytes that have passed."""

    seconds: float
    pace: float = math.inf


class _Time:
    """What is left of a patience."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._began = time.monotonic()

    def left(self, passed: int) -> float:
        """Seconds for the next piece. Raises TimeoutError where there are none."""
        left = self._began + self._patience.seconds + passed / self._patience.pace - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"{passed} bytes of a frame passed in {self._patience.seconds:g} s and more")
        return min(left, LONGEST_TIMEOUT)


def send_frame(there: socket.socket, frame: Frame, patience: Patience) -> None:
    """Sends a frame whole. Raises FrameError where it is too large to be read, TimeoutError where that takes too long, OSError where the other side is gone."""
    head = json.dumps({**frame.head, "lengths": [len(blob) for blob in frame.blobs]}).encode("utf-8")
    size = sum(map(len, frame.blobs))
    _check_size(len(head), size)
    timer, sent = _Time(patience), 0
    for piece in (LENGTHS.pack(len(head), size) + head, *frame.blobs):
        view = memoryview(piece)
        while view:
            there.settimeout(timer.left(sent))
            with suppress(TimeoutError):  # `left` says whether the time is over
                count = there.send(view[:CHUNK])
                sent, view = sent + count, view[count:]


def receive_frame(there: socket.socket, patience: Patience) -> Frame:
    """Receives a frame; no more memory is taken than has arrived.

    Raises ClosedError where the other side closes first, FrameError for anything that is no frame, TimeoutError where it takes longer than `patience`
    allows, OSError as the socket does.
    """
    inlet = _Inlet(there, patience)
    head_length, body_length = LENGTHS.unpack(inlet.exactly(LENGTHS.size))
    _check_size(head_length, body_length)
    head = _object(inlet.exactly(head_length))
    lengths = head.pop("lengths", None)
    if not _are_lengths(lengths) or sum(lengths) != body_length:
        raise FrameError("a frame whose lengths do not add up")
    return Frame(head, tuple(inlet.exactly(length) for length in lengths))


def _check_size(head_length: int, body_length: int) -> None:
    if head_length > LONGEST_HEAD or body_length > MOST_BYTES:
        raise FrameError(
            f"a frame of {head_length} and {body_length} bytes, at most {LONGEST_HEAD} and {MOST_BYTES} are read"
        )


class _Inlet:
    """Where a frame comes in, piece by piece."""

    def __init__(self, there: socket.socket, patience: Patience) -> None:
        self._there = there
        self._timer = _Time(patience)
        self._received = 0

    def exactly(self, count: int) -> bytes:
        """The next bytes, so many."""
        received = bytearray()
        while len(received) < count:
            self._there.settimeout(self._timer.left(self._received))
            try:
                chunk = self._there.recv(min(CHUNK, count - len(received)))
            except TimeoutError:  # `left` says whether the time is over
                continue
            if not chunk:
                raise ClosedError(f"closed after {len(received)} of {count} bytes")
            received += chunk
            self._received += len(chunk)
        return bytes(received)


def _object(text: bytes) -> dict[str, Any]:
    try:
        head = json.loads(text.decode("utf-8"))
    except RecursionError as error:
        raise FrameError(DEEPEST) from error
    except ValueError as error:
        raise FrameError(f"no JSON ({error})") from error
    if not isinstance(head, dict):
        raise FrameError("no JSON object")
    return head


def _are_lengths(lengths: object) -> bool:
    return isinstance(lengths, list) and all(type(length) is int and length >= 0 for length in lengths)


def pack_content(content: RecordDict) -> tuple[dict[str, Any], list[bytes]]:
    """Gives a message's content as JSON values and blobs: of each record its kind, and the place of its one text or its one safetensors blob.

    Raises FrameError for records of another form; none of ours has one.
    """
    described: dict[str, Any] = {}
    blobs: list[bytes] = []
    for name, record in content.items():
        if isinstance(record, ConfigRecord) and set(record) == {"json"} and isinstance(record["json"], str):
            described[name] = [TEXT, len(blobs)]
            blobs.append(record["json"].encode("utf-8"))
        elif isinstance(record, ArrayRecord) and list(record) == ["blob"] and record["blob"].stype == "safetensors":
            described[name] = [BLOB, len(blobs)]
            blobs.append(bytes(record["blob"].data))
        else:
            raise FrameError(f"record {str(name)[:100]!r} is neither a text nor a safetensors blob")
    return described, blobs


def unpack_content(described: object, blobs: Sequence[bytes]) -> RecordDict:
    """Reads it again. Raises FrameError."""
    if not isinstance(described, dict):
        raise FrameError("no content")
    return RecordDict({name: _record(name, entry, blobs) for name, entry in described.items()})


def _record(name: str, entry: object, blobs: Sequence[bytes]) -> ConfigRecord | ArrayRecord:
    match entry:
        case ["text" | "blob" as kind, int(place)] if type(place) is int and 0 <= place < len(blobs):
            blob = blobs[place]
        case _:
            raise FrameError(f"record {name[:100]!r} names no blob")
    if kind == BLOB:
        return ArrayRecord({"blob": Array(dtype="uint8", shape=(len(blob),), stype="safetensors", data=blob)})
    try:
        return ConfigRecord({"json": blob.decode("utf-8")})
    except UnicodeDecodeError as error:
        raise FrameError(f"record {name[:100]!r} is no UTF-8") from error
