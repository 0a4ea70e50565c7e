"""The faults: what one client of seven does wrong, and what the server is to make of it."""

import json
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict

from fedunlearn.aggregation.factors import A
from fedunlearn.federation.faults import CLIENT_DIED, CLIENT_RAISED, CLIENT_TIMEOUT
from fedunlearn.federation.turn import HEADER, HEADER_PER_TENSOR
from fedunlearn.federation.wire import ADAPTER, LONGEST_LIST, LONGEST_RECORD, REPLY, RollCallReply

from .replay import SILENT, Answer, Work, declared

SMALLER = 6
"""A client that owns fewer rows than the others."""
FLOWERS_OWN_CODE = 2
MANY = int("9" * 400)


@dataclass(frozen=True)
class Fault:
    """What a client sends in place of its update, in every round. code: the reason that the history must give, empty where the update counts.

    counts: `not` at all, as its `honest` self, or as a `zero` update.
    """

    name: str
    code: str
    act: Callable[[Work], Answer]
    counts: Literal["not", "honest", "zero"] = "not"


@dataclass(frozen=True)
class RollCallFault:
    """What a client says at the roll call. said: a part of the refusal. costs_another: its twin loses its place too."""

    name: str
    said: str
    act: Callable[[RollCallReply], Answer]
    costs_another: bool = False


def twin_of(client: int) -> int:
    """A client that owns as many rows, and where ranks differ has the same."""
    return 1 if client == 2 else 2


def _with_first(work: Work, change: Callable[[torch.Tensor], torch.Tensor]) -> RecordDict:
    name = min(work.tensors)
    return work.holding({**work.tensors, name: change(work.tensors[name])})


def _with_all(work: Work, change: Callable[[torch.Tensor], torch.Tensor]) -> RecordDict:
    return work.holding({name: change(tensor) for name, tensor in work.tensors.items()})


def _entry(value: float) -> Callable[[Work], Answer]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        spoilt = tensor.clone()
        spoilt.view(-1)[-1] = value
        return spoilt

    return lambda work: _with_first(work, change)


def _without_a_key(work: Work) -> Answer:
    return work.holding({name: tensor for name, tensor in work.tensors.items() if name != min(work.tensors)})


def _with_another_key(work: Work) -> Answer:
    """Under a mask the factor that rests, else a tensor of no meaning."""
    name = max(work.tensors)
    twins = {name.replace(".lora_A.", ".lora_B."), name.replace(".lora_B.", ".lora_A.")} - set(work.tensors)
    return work.holding({**work.tensors, min(twins, default="base.weight"): torch.zeros(2, 3)})


def _too_large(times: float) -> Callable[[Work], Answer]:
    return lambda work: work.holding(
        {name: work.start[name] + times * (t - work.start[name]) for name, t in work.tensors.items()}
    )


def _gauge(times: float) -> Callable[[Work], Answer]:
    """The same product with A so many times larger and B smaller: its mean with others' factors is not. One factor alone: itself so many times."""

    def act(work: Work) -> Answer:
        alone = len({A in name for name in work.tensors}) == 1
        grows = max(times, 1 / times) if alone else times
        return work.holding({n: t * (grows if A in n or alone else 1 / times) for n, t in work.tensors.items()})

    return act


def _largest(work: Work) -> Answer:
    return _with_all(work, lambda tensor: torch.full_like(tensor, torch.finfo(tensor.dtype).max))


def _ten_times_the_size(work: Work) -> Answer:
    allowed = (
        1.5 * sum(t.numel() * t.element_size() for t in work.tensors.values())
        + HEADER_PER_TENSOR * len(work.tensors)
        + HEADER
    )
    return work.carrying(work.blob + bytes(10 * int(allowed)))


def _pickled(work: Work) -> Answer:
    return work.carrying(pickle.dumps({name: tensor.numpy() for name, tensor in work.tensors.items()}))


def _as_flower_would(work: Work) -> Answer:
    return work.message(ADAPTER, ArrayRecord({name: Array(tensor.numpy()) for name, tensor in work.tensors.items()}))


def _many_arrays(work: Work) -> Answer:
    return work.message(ADAPTER, ArrayRecord({str(k): Array("uint8", (1,), "safetensors", b"x") for k in range(100)}))


def _header(change: Callable[[dict[str, dict[str, list[int]]], list[str]], object]) -> Callable[[Work], Answer]:
    """Another safetensors header before the same bytes; `change` gets the header and its tensors' names in file order."""

    def act(work: Work) -> Answer:
        blob = work.blob
        (size,) = struct.unpack("<Q", blob[:8])
        header = json.loads(blob[8 : 8 + size])
        change(header, sorted(header, key=lambda name: header[name]["data_offsets"]))
        text = json.dumps(header).encode()
        return work.carrying(struct.pack("<Q", len(text)) + text + blob[8 + size :])

    return act


def _ends_later(header: dict[str, dict[str, list[int]]], names: list[str]) -> None:
    header[names[-1]]["data_offsets"][1] += 10**12


def _has_a_huge_shape(header: dict[str, dict[str, list[int]]], names: list[str]) -> None:
    header[names[0]]["shape"] = [2**31, 2**31]


def _lies_in_one_place(header: dict[str, dict[str, list[int]]], names: list[str]) -> None:
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def _talks(header: dict[str, dict[str, list[int]]], names: list[str]) -> None:
    header["__metadata__"] = {"note": "x" * 10_000}


def _long_header(work: Work) -> Answer:
    return work.carrying(struct.pack("<Q", 2**60) + work.blob[8:])


def _swapped(work: Work) -> Answer:
    honest = work.message()
    return RecordDict({ADAPTER: honest[REPLY], REPLY: honest[ADAPTER]})


def _only(key: str) -> Callable[[Work], Answer]:
    return lambda work: RecordDict({key: work.message()[key]})


def _beside_the_json(work: Work) -> Answer:
    return work.message(REPLY, ConfigRecord({**work.message()[REPLY], "accuracy": 1.0}))


def _lacks_a_field(work: Work) -> Answer:
    fields = json.loads(str(work.message()[REPLY]["json"]))
    return work.saying(json.dumps({key: value for key, value in fields.items() if key != "num_steps"}))


def _says(**changes: object) -> Callable[[Work], Answer]:
    return lambda work: work.saying(**changes)


def _writes(text: str) -> Callable[[Work], Answer]:
    return lambda work: work.saying(text)


def _error(code: int, text: str = "") -> Callable[[object], Answer]:
    return lambda work: Error(code, text)


def _nested(depth: int) -> str:
    return "[" * depth


FAULTS: tuple[Fault, ...] = (
    Fault("NaN", "nan", _entry(float("nan"))),
    Fault("inf", "nan", _entry(float("inf"))),
    Fault("a (1, d) array", "shape", lambda work: _with_first(work, lambda t: t[:1])),
    Fault("wrong shape", "shape", lambda work: _with_first(work, lambda t: torch.cat([t, t]))),
    Fault("transposed", "shape", lambda work: _with_all(work, lambda t: t.T)),
    Fault("missing key", "missing_key", _without_a_key),
    Fault("extra key", "extra_key", _with_another_key),
    Fault("extra key, terminal codes", "extra_key", lambda work: work.holding({**work.tensors, "\x1b[2J\n": torch.zeros(2)})),
    Fault("no tensors", "missing_key", lambda work: work.holding({})),
    Fault("float16", "dtype", lambda work: _with_all(work, torch.Tensor.half)),
    Fault("bfloat16", "dtype", lambda work: _with_all(work, torch.Tensor.bfloat16)),
    Fault("float64", "dtype", lambda work: _with_all(work, torch.Tensor.double)),
    Fault("int", "dtype", lambda work: _with_all(work, lambda t: (100 * t).int())),
    Fault("num-examples 1e12", "num_examples", _says(num_examples=10**12)),
    Fault("num-examples -59", "num_examples", _says(num_examples=-59)),
    Fault("num-examples NaN", "num_examples", _says(num_examples=float("nan"))),
    Fault("num-examples of 400 digits", "num_examples", _says(num_examples=MANY)),
    Fault("num-trained 1e12", "num_examples", _says(num_trained=10**12)),
    Fault("zero update", "", lambda work: work.holding(work.start), "zero"),
    Fault("update 1e6 times too large", "norm", _too_large(1e6)),
    Fault("A a million times B", "norm", _gauge(1e6)),
    Fault("B a million times A", "norm", _gauge(1e-6)),
    Fault("largest float32", "norm", _largest),
    Fault("a round of 400 digits", "unreadable", _says(round=MANY)),
    Fault("another round", "stale_round", lambda work: work.saying(round=work.reply.round - 1)),
    Fault("another run", "stale_round", _says(run_id="yesterday")),
    Fault("another client's id", "stale_round", lambda work: work.saying(client_id=twin_of(work.reply.client_id))),
    Fault("another base", "base_mismatch", _says(base_fingerprint="0" * 64)),
    Fault("raises", "crashed", _error(CLIENT_RAISED, "RuntimeError: no memory left\nline two")),
    Fault("raises, terminal codes", "crashed", _error(CLIENT_RAISED, "\x1b[2J\x07" * 1000)),
    Fault("raises under Flower", "crashed", _error(FLOWERS_OWN_CODE)),
    Fault("hangs, is ended", "timeout", _error(CLIENT_TIMEOUT, "no reply within 1 s")),
    Fault("hangs, no reply", "timeout", _error(SILENT)),
    Fault("dies", "crashed", _error(CLIENT_DIED, "exit code 9")),
    Fault("no safetensors", "unreadable", lambda work: work.carrying(b"all your base" * 1000)),
    Fault("a pickle", "unreadable", _pickled),
    Fault("Flower's arrays", "unreadable", _as_flower_would),
    Fault("a hundred arrays", "unreadable", _many_arrays),
    Fault("no bytes", "unreadable", lambda work: work.carrying(b"")),
    Fault("ten times the size", "wire_size", _ten_times_the_size),
    Fault("header of 2^60 bytes", "unreadable", _long_header),
    Fault("header: offsets past the end", "unreadable", _header(_ends_later)),
    Fault("header: shape of 2^62", "unreadable", _header(_has_a_huge_shape)),
    Fault("header: two in one place", "unreadable", _header(_lies_in_one_place)),
    Fault("header: a note", "", _header(_talks), "honest"),
    Fault("a million '['", "unreadable", _writes(_nested(LONGEST_RECORD))),
    Fault("two million '['", "wire_size", _writes(_nested(2 * LONGEST_RECORD))),
    Fault("a list for an object", "unreadable", _writes("[1]")),
    Fault("no JSON", "unreadable", _writes("{'round': 1}")),
    Fault("missing field", "unreadable", _lacks_a_field),
    Fault("400 digits for a float", "unreadable", _says(seconds=MANY)),
    Fault("400 digits for an int", "unreadable", _says(num_steps=MANY)),
    Fault("5000 digits", "unreadable", lambda work: work.saying(json.dumps({"round": 1}).replace("1", "9" * 5000))),
    Fault("NaN seconds", "unreadable", _says(seconds=float("nan"))),
    Fault("text for a loss", "unreadable", _says(loss="low")),
    Fault("terminal codes", "unreadable", _says(run_id="\x1b[2J")),
    Fault("half a surrogate", "unreadable", _says(run_id="\ud800")),
    Fault("100,001 losses", "wire_size", _says(loss_trace=[1.5] * (LONGEST_LIST + 1))),
    Fault("loss 1e308", "", _says(loss=1e308), "honest"),
    Fault("loss -7", "", _says(loss=-7.0), "honest"),
    Fault("loss NaN", "", _says(loss=float("nan"), loss_trace=[float("nan"), float("-inf")]), "honest"),
    Fault("extra metric", "extra_metric", _says(accuracy=1.0)),
    Fault("extra metric, text", "extra_metric", _says(**{"\x1b[2J\ud800": "x" * 1000})),
    Fault("metric beside the JSON", "extra_metric", _beside_the_json),
    Fault("extra MetricRecord", "extra_metric", lambda work: work.message("metrics", MetricRecord({"accuracy": 1.0}))),
    Fault("empty message", "unreadable", lambda work: RecordDict()),
    Fault("records swapped", "unreadable", _swapped),
    Fault("no adapter", "unreadable", _only(REPLY)),
    Fault("no reply beside", "unreadable", _only(ADAPTER)),
    Fault("lacks parts for ever", "missing_part", _says(missing=["0" * 64])),
)  # fmt: skip


def _declares(**changes: object) -> Callable[[RollCallReply], Answer]:
    return lambda said: declared(said, **changes)


def _counts(num: int) -> Callable[[RollCallReply], Answer]:
    return _declares(num_owned=num, num_forget=0, num_retain=num)


def _everywhere(value: float) -> Callable[[Work], Answer]:
    return lambda work: _with_all(work, lambda tensor: torch.full_like(tensor, value))


SMALL_ROLE_FAULTS: tuple[Fault, ...] = (
    Fault("9e14 everywhere", "norm", _everywhere(9e14)),
    Fault("50.0 everywhere", "norm", _everywhere(50.0)),
    Fault("1e6 A, B / 1e6", "norm", _gauge(1e6)),
)
"""Finite, and on the way to the mean unless they are judged by themselves: a role of two has no median."""


ROLL_CALL_FAULTS: tuple[RollCallFault, ...] = (
    RollCallFault("roll call: silent", "did not answer in time", _error(SILENT)),
    RollCallFault("roll call: raises", "failed: no disk", _error(CLIENT_RAISED, "no disk\nTraceback")),
    RollCallFault("roll call: terminal codes", "failed: ", _error(CLIENT_RAISED, "\x1b[2J\x07")),
    RollCallFault("roll call: 0 rows", "declares", _counts(0)),
    RollCallFault("roll call: -59 rows", "declares", _counts(-59)),
    RollCallFault("roll call: 1e12 rows", "declares", _counts(10**12)),
    RollCallFault("roll call: 400 digits of rows", "cannot be read", _counts(MANY)),
    RollCallFault("roll call: NaN rows", "cannot be read", _declares(num_owned=float("nan"))),
    RollCallFault("roll call: another's id", f"client {SMALLER} declares", _declares(client_id=SMALLER)),
    RollCallFault("roll call: a double", "2 nodes say", lambda said: declared(said, client_id=twin_of(said.client_id)), costs_another=True),
    RollCallFault("roll call: no such client", "client 77", _declares(client_id=77)),
    RollCallFault("roll call: client -1", "client -1", _declares(client_id=-1)),
    RollCallFault("roll call: another version", "has version", _declares(version="0.0.0")),
    RollCallFault("roll call: another base", "has base_fingerprint", _declares(base_fingerprint="0" * 64)),
    RollCallFault("roll call: another partition", "has partition_hash", _declares(partition_hash="0" * 64)),
    RollCallFault("roll call: another rank", "has LoRA rank", _declares(rank=3 * 10**9)),
    RollCallFault("roll call: alpha NaN", "has LoRA rank", _declares(lora_alpha=float("nan"))),
    RollCallFault("roll call: a million '['", "cannot be read", lambda said: RecordDict({REPLY: ConfigRecord({"json": "[" * 10**6})})),
    RollCallFault("roll call: an empty message", "cannot be read", lambda said: RecordDict()),
    RollCallFault("roll call: extra metric", "cannot be read", _declares(accuracy=1.0)),
)  # fmt: skip

BY_NAME: Mapping[str, Fault | RollCallFault] = {fault.name: fault for fault in (*FAULTS, *ROLL_CALL_FAULTS)}
