"""What crosses the wire: one safetensors blob an adapter, a few scalars beside it; never pickle."""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import safetensors.torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedunlearn.limits import LARGEST
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.requests import ReleasedRow
from fedunlearn.records.rounds import ClientRows, ClientTask, Role, Share, Trained

ADAPTER, REQUEST, REPLY, RELEASED = "adapter", "request", "reply", "released"
PART = "part-"
R = TypeVar("R")
LONGEST_TEXT, LONGEST_RECORD, LONGEST_LIST, MOST = 256, 1_000_000, 100_000, 1e15
LONGEST_LINE, LONGEST_MEMORY, INT64 = 300, 100, range(-(2**63), 2**63)
HASH = re.compile("[0-9a-f]{64}")


class WireError(ValueError):
    """What came over the wire is not what was agreed; `reason` is the gate's code for it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Server to client: one task of one round, and the hashes of the parts it is made of.

    adapter, sidecar: what training starts from; reference, reference_sidecar: what unlearning began with (empty where it is not read).
    keep: parts that later rounds will name again; the client may forget all others.
    """

    run_id: str
    round: int
    client_id: int
    role: str
    epochs: float
    rounds: int
    part: int
    parts: int
    lr_scale: float
    seed: int
    mu: float
    trained: str
    memory: dict[str, float]
    radius: float
    adapter: tuple[str, ...]
    sidecar: tuple[str, ...]
    reference: tuple[str, ...]
    reference_sidecar: tuple[str, ...]
    keep: tuple[str, ...]

    def check(self) -> None:
        """Raises WireError where a number is none that a task has, or a part is not named by a hash."""
        _check_names(*self.adapter, *self.sidecar, *self.reference, *self.reference_sidecar, *self.keep)
        odd = [
            f"{name}={value}"
            for name, value in (("lr_scale", self.lr_scale), ("mu", self.mu), ("radius", self.radius))
            if not 0 <= value < MOST
        ]
        odd += [f"memory.{name}={value}" for name, value in self.memory.items() if not abs(value) < MOST]
        if not 0 < self.epochs <= LARGEST:
            odd.append(f"epochs={self.epochs}")
        if not 1 <= self.part <= self.parts or self.rounds < 1:
            odd.append(f"part {self.part} of {self.parts} of {self.rounds} rounds")
        if odd:
            raise WireError("unreadable", f"no task has {odd[0]}")

    @property
    def task(self) -> ClientTask:
        """The task for the training loop."""
        return ClientTask(
            client_id=self.client_id,
            role=Role(self.role),
            epochs=self.epochs,
            share=Share(rounds=self.rounds, part=self.part, parts=self.parts),
            lr_scale=self.lr_scale,
            seed=self.seed,
            mu=self.mu,
            trained=Trained(self.trained),
            memory=self.memory,
            radius=self.radius,
        )


@dataclass(frozen=True, kw_only=True)
class TrainReply:
    """Client to server, beside the adapter: what ClientUpdate says in numbers. seconds_loading: spent on loading the base for this task, 0 where it was there. memory: what its method remembers. stopped: why its guard ended the
    epoch. missing: parts it lacks, for want of which it did nothing.
    """

    run_id: str
    round: int
    client_id: int
    base_fingerprint: str
    num_examples: int
    num_trained: int
    num_steps: int
    num_tokens: int
    num_reference_tokens: int
    seconds: float
    seconds_loading: float
    loss: float
    loss_trace: tuple[float, ...]
    memory: dict[str, float]
    stopped: str
    missing: tuple[str, ...]

    def check_account(self) -> None:
        """Raises WireError where steps, tokens or seconds cannot be: negative, not finite or absurdly large."""
        account = (self.num_steps, self.num_tokens, self.num_reference_tokens, self.seconds, self.seconds_loading)
        if not all(math.isfinite(value) and 0 <= value < MOST for value in account):
            raise WireError("unreadable", f"steps, tokens and seconds {account} are not between 0 and {MOST:g}")


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Server to client: score the global adapter, made of these parts, on rows of your own. rows: of each kind at most (0: all), drawn by `seed`.

    keep: parts that training will name again.
    """

    run_id: str
    round: int
    client_id: int
    rows: int
    seed: int
    adapter: tuple[str, ...]
    sidecar: tuple[str, ...]
    keep: tuple[str, ...]

    def check(self) -> None:
        """Raises WireError for a negative number of rows, or a part that is not named by a hash."""
        _check_names(*self.adapter, *self.sidecar, *self.keep)
        if self.rows < 0:
            raise WireError("unreadable", f"no evaluation has rows={self.rows}")


@dataclass(frozen=True, kw_only=True)
class EvaluateReply:
    """Client to server: means over its own forget and retain rows (0 where it has none), and over how many. missing: parts it lacks, for want of which it did nothing."""

    run_id: str
    round: int
    client_id: int
    base_fingerprint: str
    num_forget: int
    num_retain: int
    forget_loss: float
    forget_prob: float
    retain_loss: float
    retain_prob: float
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RollCallReply:
    """Client to server, once a run: who it is and whether it can take part. rank, lora_alpha: of the factors it trains and sends.

    layout: of the adapter that its base and the config make (records.adapter). joins: the round from which it is there.
    """

    client_id: int
    version: str
    base_fingerprint: str
    partition_hash: str
    request_hash: str
    num_owned: int
    num_forget: int
    num_retain: int
    rank: int
    lora_alpha: float
    joins: int
    quantization: str = "none"
    layout: str = ""

    @property
    def rows(self) -> ClientRows:
        """The row counts for the protocol."""
        return ClientRows(
            client_id=self.client_id, num_owned=self.num_owned, num_forget=self.num_forget, num_retain=self.num_retain
        )


def pack_adapter(tensors: Tensors) -> ArrayRecord:
    """Gives tensors as one safetensors blob in one Array (bf16 kept; 130 B of header a tensor)."""
    return pack_blob(safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def pack_blob(blob: bytes) -> ArrayRecord:
    """Gives safetensors bytes as they travel."""
    return ArrayRecord({"blob": Array(dtype="uint8", shape=(len(blob),), stype="safetensors", data=blob)})


def blob_of(record: ArrayRecord) -> bytes:
    """Gives the safetensors bytes of a packed adapter. Raises WireError for anything else."""
    if list(record) != ["blob"] or record["blob"].stype != "safetensors":
        raise WireError(
            "unreadable", f"no packed adapter: {len(record)} arrays, first {[name[:40] for name in record][:1]}"
        )
    return bytes(record["blob"].data)


def pack_scalars(record: object) -> ConfigRecord:
    """Gives a flat record of ours as one JSON string in a ConfigRecord: None, int64 and empty strings survive as they are."""
    return ConfigRecord({"json": json.dumps(shallow(record), sort_keys=True)})


def shallow(record: object) -> dict[str, object]:
    """Gives a flat record's fields by name, nothing copied."""
    return {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]


def pack_released(rows: Sequence[ReleasedRow]) -> ConfigRecord:
    """Gives released rows as one JSON string."""
    return ConfigRecord({"json": json.dumps([[row.number, row.question, row.answer] for row in rows])})


def unpack_released(record: ConfigRecord) -> tuple[ReleasedRow, ...]:
    """Reads them again. Raises WireError for anything else."""
    try:
        rows = [(row, question, answer) for row, question, answer in json.loads(str(record["json"]))]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError("unreadable", f"no released rows ({type(error).__name__})") from error
    if not all(type(row) is int and isinstance(q, str) and isinstance(a, str) for row, q, a in rows):
        raise WireError("unreadable", "released rows are a number, a question and an answer each")
    return tuple(ReleasedRow(*row) for row in rows)


def unpack_scalars(kind: type[R], record: ConfigRecord) -> R:
    """Reads a record packed by pack_scalars. Raises WireError where fields are missing, unknown, of another type or too long."""
    extra = sorted(set(record) - {"json"})
    if extra:
        raise WireError("extra_metric", f"{extra[0][:LONGEST_TEXT]!r} beside the {kind.__name__}")
    data = _json_object(kind.__name__, record.get("json"))
    known = {field.name: field.type for field in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise WireError("extra_metric", f"{kind.__name__} has no {unknown[0][:LONGEST_TEXT]!r}")
    absent = sorted(set(known) - set(data))
    if absent:
        raise WireError("unreadable", f"{kind.__name__} lacks {absent[0]!r}")
    return kind(**{name: _typed(f"{kind.__name__}.{name}", value, known[name]) for name, value in data.items()})


def _check_names(*names: str) -> None:
    """A part's name becomes a file's name: nothing but a hash is one."""
    odd = next((name for name in names if not HASH.fullmatch(name)), None)
    if odd is not None:
        raise WireError("unreadable", f"a part is named {odd!r}, which is no sha256")


def _json_object(kind: str, text: object) -> dict[str, object]:
    if not isinstance(text, str):
        raise WireError("unreadable", f"no {kind} in the message")
    if len(text) > LONGEST_RECORD:
        raise WireError("wire_size", f"{kind} has {len(text)} characters, at most {LONGEST_RECORD} are read")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # a million opening brackets are short, and deep
        raise WireError("unreadable", f"{kind} is no JSON ({type(error).__name__})") from error
    if not isinstance(data, dict):
        raise WireError("unreadable", f"{kind} is no JSON object")
    return data


def _typed(name: str, value: object, wanted: object) -> object:
    if wanted in (tuple[float, ...], tuple[str, ...]) and isinstance(value, list):
        if len(value) > LONGEST_LIST:
            raise WireError("wire_size", f"{name} has {len(value)} entries, at most {LONGEST_LIST} are read")
        return tuple(_typed(name, item, float if wanted == tuple[float, ...] else str) for item in value)
    if wanted == dict[str, float] and isinstance(value, dict):
        if len(value) > LONGEST_MEMORY:
            raise WireError("wire_size", f"{name} has {len(value)} entries, at most {LONGEST_MEMORY} are read")
        return {str(_typed(name, key, str)): _typed(f"{name}.{key}", item, float) for key, item in value.items()}
    if isinstance(value, str):
        if len(value) > LONGEST_TEXT or not value.isprintable():
            raise WireError("unreadable", f"{name} is no plain text of at most {LONGEST_TEXT} characters")
        value = sys.intern(value)  # what all clients say alike is kept once
    if wanted is float and type(value) is int and abs(value) < MOST:
        return float(value)
    if not isinstance(wanted, type) or type(value) is not wanted or (type(value) is int and value not in INT64):
        reason = "num_examples" if name.endswith((".num_examples", ".num_trained")) else "unreadable"
        raise WireError(reason, f"{name}={str(value)[:LONGEST_TEXT]!r} is no {getattr(wanted, '__name__', wanted)}")
    return value


def one_line(text: str) -> str:
    """Gives what a client wrote as a line of log and history can hold it: the first line, no longer than 300 characters, nothing a terminal obeys."""
    line = text.strip().split("\n")[0][: LONGEST_LINE + 1]
    told = line if line.isprintable() else repr(line)[1:-1]
    return told if len(told) <= LONGEST_LINE else f"{told[: LONGEST_LINE - 2]}.."


def typed_record(kind: type[R], record: object) -> R:
    """Gives a message's record, checked. Raises WireError where another kind of record stands there, or none."""
    if not isinstance(record, kind):
        raise WireError("unreadable", f"{type(record).__name__} where {kind.__name__} is wanted")
    return record


def check_records(content: RecordDict, *awaited: str) -> None:
    """Raises WireError where a message has another record beside those awaited."""
    extra = sorted(set(content) - set(awaited))
    if extra:
        raise WireError("extra_metric", f"a record {extra[0][:LONGEST_TEXT]!r} beside the reply")


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
