"""The child process of launcher.isolate=true: the very ClientApp of the other launchers, behind a pipe.

Frames on the pipe: a Charge as JSON, READY back; then messages and replies as Flower's protobuf, one reply a message. Never pickle.
"""

import importlib
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from fedunlearn.federation.faults import REPLY_UNREADABLE
from fedunlearn.federation.local_grid import call_client, context_of
from fedunlearn.orphans import end_with_parent
from fedunlearn.reporting.console import set_logging

READY = b"ready"


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What a worker is started for. app: `module:function` that gives a ClientApp when called with `argument`."""

    app: str
    argument: str
    num_clients: int
    log_level: int = logging.WARNING


def serve(fd: int) -> None:
    """Reads a Charge from the socket `fd` and answers messages until it closes, which also ends whatever work is under way."""
    end_with_parent(fd)
    pipe = Connection(fd)
    charge = Charge(**json.loads(pipe.recv_bytes()))
    set_logging()
    logging.getLogger().setLevel(charge.log_level)
    app = _make_app(charge)
    with suppress(EOFError, ConnectionError):
        pipe.send_bytes(READY)
        while True:
            pipe.send_bytes(_answer(app, charge.num_clients, pipe.recv_bytes()))


def _make_app(charge: Charge) -> ClientApp:
    module, _, name = charge.app.partition(":")
    app = getattr(importlib.import_module(module), name)(charge.argument)
    if not isinstance(app, ClientApp):
        raise TypeError(f"{charge.app} gave a {type(app).__name__}, no ClientApp")
    return app


def _answer(app: ClientApp, num_clients: int, frame: bytes) -> bytes:
    message = message_from_proto(ProtoMessage.FromString(frame))
    reply = call_client(app, context_of(message.metadata.dst_node_id, num_clients), message)
    try:
        return _to_bytes(reply)
    except Exception as error:  # whatever a client has put into its reply
        fault = Error(REPLY_UNREADABLE, f"{type(error).__name__}: {error}")
        return _to_bytes(Message(fault, reply_to=message))


def _to_bytes(message: Message) -> bytes:
    return bytes(message_to_proto(message).SerializeToString())
