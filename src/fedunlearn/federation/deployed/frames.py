"""What crosses a worker's socket: one JSON object and the safetensors blobs it names; never pickle.

A frame is two lengths (8 bytes each, big endian), the JSON and the blobs one after the other. Knows no torch.
"""

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

LENGTHS = struct.Struct(">QQ")
LONGEST_HEAD = 64 * 2**20
MOST_BYTES = 2**33
CHUNK = 2**20
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


def send_frame(there: socket.socket, frame: Frame) -> None:
    """Sends a frame whole. Raises OSError where the other side is gone."""
    head = json.dumps({**frame.head, "lengths": [len(blob) for blob in frame.blobs]}).encode("utf-8")
    there.sendall(LENGTHS.pack(len(head), sum(map(len, frame.blobs))) + head)
    for blob in frame.blobs:
        there.sendall(blob)


def receive_frame(there: socket.socket, most: int = MOST_BYTES) -> Frame:
    """Receives a frame of at most `most` bytes of blobs; no more memory is taken than has arrived.

    Raises ClosedError where the other side closes first, FrameError for anything that is no frame, OSError as the socket does.
    """
    head_length, body_length = LENGTHS.unpack(_exactly(there, LENGTHS.size))
    if head_length > LONGEST_HEAD or body_length > most:
        raise FrameError(
            f"a frame of {head_length} and {body_length} bytes, at most {LONGEST_HEAD} and {most} are read"
        )
    head = _object(_exactly(there, head_length))
    lengths = head.pop("lengths", None)
    if not _are_lengths(lengths) or sum(lengths) != body_length:
        raise FrameError("a frame whose lengths do not add up")
    return Frame(head, tuple(_exactly(there, length) for length in lengths))


def _exactly(there: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        chunk = there.recv(min(CHUNK, count - len(received)))
        if not chunk:
            raise ClosedError(f"closed after {len(received)} of {count} bytes")
        received += chunk
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
    """Gives a message's content as JSON values and blobs: one text a ConfigRecord of ours, one blob an ArrayRecord of ours.

    Raises FrameError for records of another form; none of ours has one.
    """
    described: dict[str, Any] = {}
    blobs: list[bytes] = []
    for name, record in content.items():
        if isinstance(record, ConfigRecord) and set(record) == {"json"} and isinstance(record["json"], str):
            described[name] = record["json"]
        elif isinstance(record, ArrayRecord) and list(record) == ["blob"] and record["blob"].stype == "safetensors":
            described[name] = len(blobs)
            blobs.append(bytes(record["blob"].data))
        else:
            raise FrameError(f"record {str(name)[:100]!r} is neither a text nor a safetensors blob")
    return described, blobs


def unpack_content(described: object, blobs: Sequence[bytes]) -> RecordDict:
    """Reads it again. Raises FrameError."""
    if not isinstance(described, dict):
        raise FrameError("no content")
    content = RecordDict()
    for name, value in described.items():
        if isinstance(value, str):
            content[name] = ConfigRecord({"json": value})
        elif type(value) is int and 0 <= value < len(blobs):
            blob = blobs[value]
            array = Array(dtype="uint8", shape=(len(blob),), stype="safetensors", data=blob)
            content[name] = ArrayRecord({"blob": array})
        else:
            raise FrameError(f"record {name[:100]!r} names no blob")
    return content
