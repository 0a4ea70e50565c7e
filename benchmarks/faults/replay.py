"""Clients that answer from the record: behind a Grid that lets one of them go wrong, and as a ClientApp for a process of its own."""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from fedunlearn.federation import link
from fedunlearn.federation.faults import REPLY_UNREADABLE
from fedunlearn.federation.local_grid import SERVER_NODE, SequentialGrid
from fedunlearn.federation.part_store import joined
from fedunlearn.federation.wire import (
    ADAPTER,
    PART,
    REPLY,
    REQUEST,
    RollCallReply,
    TrainReply,
    TrainRequest,
    blob_of,
    pack_blob,
    pack_scalars,
    unpack_scalars,
)
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import Trained
from fedunlearn.records.shape import ClientShape

from .recording import Recorded

SILENT = -1
Answer = RecordDict | Error


@dataclass(frozen=True, eq=False, kw_only=True)
class Work:
    """What an honest client would send: its reply and the factors it trained. start: the same factors as they were sent to it."""

    reply: TrainReply
    start: Tensors
    tensors: Tensors

    def saying(self, text: str | None = None, **changes: object) -> RecordDict:
        """The message with other fields in its JSON, or other text in its place."""
        said = json.dumps({**asdict(self.reply), **changes}) if text is None else text
        return self.message(REPLY, ConfigRecord({"json": said}))

    def holding(self, tensors: Tensors) -> RecordDict:
        """The message with other tensors."""
        return self.carrying(safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))

    def carrying(self, blob: bytes) -> RecordDict:
        """The message with other bytes for its adapter."""
        return self.message(ADAPTER, pack_blob(blob))

    def message(self, key: str = "", record: object = None) -> RecordDict:
        """The message; `key` names a record that is put into it."""
        honest = {ADAPTER: pack_blob(self.blob), REPLY: pack_scalars(self.reply)}
        return RecordDict({**honest, key: record} if key else honest)

    @property
    def blob(self) -> bytes:
        """The adapter's bytes."""
        return safetensors.torch.save({name: tensor.contiguous() for name, tensor in self.tensors.items()})


class Honest:
    """All clients of the record. They add to what they are sent what they once learnt, and keep the parts they are told to keep."""

    def __init__(self, recorded: Recorded, shapes: Mapping[int, ClientShape]) -> None:
        self._recorded, self._shapes = recorded, shapes
        self._parts: dict[int, dict[str, Tensors]] = {client: {} for client in recorded.declared}

    @property
    def num_clients(self) -> int:
        """How many there are."""
        return len(self._recorded.declared)

    def declares(self, client: int) -> RollCallReply:
        """The roll call."""
        declared = self._recorded.declared[client]
        if client not in self._shapes:
            return declared
        return replace(declared, rank=self._shapes[client].rank, lora_alpha=self._shapes[client].lora_alpha)

    def works(self, client: int, content: RecordDict) -> Work:
        """One task."""
        request = unpack_scalars(TrainRequest, content[REQUEST])
        received = {key.removeprefix(PART): blob_of(content[key]) for key in content if key.startswith(PART)}
        held = self._parts[client] | {name: safetensors.torch.load(blob) for name, blob in received.items()}
        self._parts[client] = {name: part for name, part in held.items() if name in request.keep}
        missing = tuple(sorted({*request.adapter, *request.sidecar} - set(held)))
        start = {} if missing else joined(request.adapter, held)
        trained = {name: start[name] for name in sorted(start) if Trained(request.trained).covers(name)}
        said = replace(self._recorded.said[client], run_id=request.run_id, round=request.round, missing=missing)
        return Work(reply=said, start=trained, tensors=learnt(trained, self._recorded.deltas[client]))


def learnt(start: Tensors, delta: Tensors) -> Tensors:
    """Start + delta, the delta cut to the rank of what was sent."""
    return {name: t + delta[name][: t.shape[0], : t.shape[1]] for name, t in start.items()}


class ReplayGrid(SequentialGrid):
    """Nodes that answer from the record, every reply serialised and read again. works, declares: who goes wrong there, and how."""

    def __init__(
        self,
        honest: Honest,
        works: Mapping[int, Callable[[Work], Answer]] | None = None,
        declares: Mapping[int, Callable[[RollCallReply], Answer]] | None = None,
    ) -> None:
        super().__init__(honest.num_clients)
        self._honest, self._works, self._declares = honest, works or {}, declares or {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As any grid; who is silent gives nothing."""
        replies = super().pull_messages(message_ids)
        return [reply for reply in replies if not (reply.has_error() and reply.error.code == SILENT)]

    def _answer(self, message: Message) -> Message:
        client = message.metadata.dst_node_id - SERVER_NODE - 1
        answer: Answer
        if message.metadata.message_type == MessageType.QUERY:
            said = self._honest.declares(client)
            answer = self._declares[client](said) if client in self._declares else declared(said)
        else:
            work = self._honest.works(client, message.content)
            answer = self._works[client](work) if client in self._works else work.message()
        return Message(answer, reply_to=message) if isinstance(answer, Error) else _over_the_wire(answer, message)


def declared(said: RollCallReply, **changes: object) -> RecordDict:
    """A roll-call reply with other fields."""
    return RecordDict({REPLY: ConfigRecord({"json": json.dumps({**asdict(said), **changes})})})


def _over_the_wire(content: RecordDict, message: Message) -> Message:
    """As the other process of an IsolatedGrid writes it, and the grid reads it."""
    try:
        frame = message_to_proto(Message(content, reply_to=message)).SerializeToString()
        return Message(message_from_proto(ProtoMessage.FromString(frame)).content, reply_to=message)
    except Exception as error:
        return Message(Error(REPLY_UNREADABLE, f"{type(error).__name__}: {error}"), reply_to=message)


@contextmanager
def fast_clock() -> Iterator[None]:
    """Within, time passes only while the server waits for replies, and then a thousand times faster: who is silent costs nothing."""
    real, now = link.time, [0.0]

    def sleep(seconds: float) -> None:
        now[0] += 1000 * seconds

    link.time = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    try:
        yield
    finally:
        link.time = real


def make_app(argument: str) -> ClientApp:
    """A ClientApp for launcher.isolate's worker: one client, named in `argument`, `dies` or `hangs` when it is to train."""
    told = json.loads(argument)
    honest, app = Honest(Recorded.load(Path(told["folder"])), {}), ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(declared(honest.declares(_client(context))), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if _client(context) == told["client"] and told["what"] == "dies":
            os._exit(9)
        if _client(context) == told["client"] and told["what"] == "hangs":
            time.sleep(10_000)
        return Message(honest.works(_client(context), message.content).message(), reply_to=message)

    return app


def _client(context: Context) -> int:
    return int(context.node_config["partition-id"])
