"""What crosses the wire: one safetensors blob an adapter, a few scalars beside it; never pickle."""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

import safetensors.torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientRows, ClientTask, Role

ADAPTER, REFERENCE, REQUEST, REPLY = "adapter", "reference", "request", "reply"
R = TypeVar("R")
LONGEST_TEXT, LONGEST_RECORD, MOST = 256, 1_000_000, 1e15


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Server to client: one task of one round. reference_hash names the adapter that unlearning began with ('' where none is needed)."""

    run_id: str
    round: int
    client_id: int
    role: str
    epochs: float
    lr_scale: float
    seed: int
    reference_hash: str

    @property
    def task(self) -> ClientTask:
        """The task for the training loop."""
        return ClientTask(
            client_id=self.client_id, role=Role(self.role), epochs=self.epochs, lr_scale=self.lr_scale, seed=self.seed
        )


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """Client to server, beside the adapter: what ClientUpdate says in numbers. needs_reference: it had to give up, for want of the reference adapter."""

    run_id: str
    round: int
    client_id: int
    num_examples: int
    num_trained: int
    num_steps: int
    num_tokens: int
    seconds: float
    loss: float
    loss_trace: tuple[float, ...]
    needs_reference: bool

    def check_account(self) -> None:
        """Raises ValueError where steps, tokens or seconds cannot be: negative, not finite or absurdly large."""
        account = (self.num_steps, self.num_tokens, self.seconds)
        if not all(math.isfinite(value) and 0 <= value < MOST for value in account):
            raise ValueError(f"steps, tokens and seconds {account} are not between 0 and {MOST:g}")


@dataclass(frozen=True, kw_only=True)
class RollCallReply:
    """Client to server, once a run: who it is and whether it can take part."""

    client_id: int
    version: str
    base_fingerprint: str
    partition_hash: str
    num_owned: int
    num_forget: int
    num_retain: int

    @property
    def rows(self) -> ClientRows:
        """The row counts for the protocol."""
        return ClientRows(
            client_id=self.client_id, num_owned=self.num_owned, num_forget=self.num_forget, num_retain=self.num_retain
        )


def pack_adapter(tensors: Tensors) -> ArrayRecord:
    """Gives the adapter as one safetensors blob in one Array (bf16 kept; 130 B of header a tensor)."""
    blob = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return ArrayRecord({"blob": Array(dtype="uint8", shape=(len(blob),), stype="safetensors", data=blob)})


def blob_of(record: ArrayRecord) -> bytes:
    """Gives the safetensors bytes of a packed adapter. Raises ValueError for anything else."""
    if list(record) != ["blob"] or record["blob"].stype != "safetensors":
        raise ValueError(f"no packed adapter: arrays {list(record)}")
    return bytes(record["blob"].data)


def pack_scalars(record: object) -> ConfigRecord:
    """Gives a flat record of ours as one JSON string in a ConfigRecord: None, int64 and empty strings survive as they are."""
    return ConfigRecord({"json": json.dumps(asdict(record), sort_keys=True)})  # type: ignore[call-overload]


def unpack_scalars(kind: type[R], record: ConfigRecord) -> R:
    """Reads a record packed by pack_scalars. Raises ValueError where fields are missing, unknown or of another type."""
    text = str(record["json"])
    if len(text) > LONGEST_RECORD:
        raise ValueError(f"{kind.__name__} has {len(text)} characters, at most {LONGEST_RECORD} are read")
    data = json.loads(text)
    known = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(data, dict) or set(data) != set(known):
        raise ValueError(f"{kind.__name__} expected {sorted(known)}, got {sorted(data)}")
    return kind(**{name: _typed(f"{kind.__name__}.{name}", value, known[name]) for name, value in data.items()})


def _typed(name: str, value: object, wanted: object) -> object:
    if wanted == tuple[float, ...] and isinstance(value, list):
        return tuple(float(_typed(name, item, float)) for item in value)  # type: ignore[arg-type]
    if isinstance(value, str) and (len(value) > LONGEST_TEXT or not value.isprintable()):
        raise ValueError(f"{name} is no plain text of at most {LONGEST_TEXT} characters")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(wanted, type) or type(value) is not wanted:
        raise ValueError(f"{name}={value!r} is no {wanted}")
    return value


def typed_record(kind: type[R], record: object) -> R:
    """Gives a message's record, checked. Raises TypeError where another kind of record stands there."""
    if not isinstance(record, kind):
        raise TypeError(f"{type(record).__name__} where {kind.__name__} is wanted")
    return record


def content_bytes(content: RecordDict) -> int:
    """Gives the size of a message's content as protobuf would send it, without serialising the tensors a second time."""
    arrays = 0
    light = RecordDict()
    for key, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays += sum(len(array.data) for array in record.values())
            light[key] = ArrayRecord(
                {name: Array(dtype=a.dtype, shape=a.shape, stype=a.stype, data=b"") for name, a in record.items()}
            )
        else:
            light[key] = record
    return arrays + int(recorddict_to_proto(light).ByteSize())
