"""Mutations of real messages: records, scalars, safetensors blobs and the bytes of the whole, drawn by hypothesis."""

import json
import struct
from collections.abc import Callable, Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from hypothesis import strategies as st

NAN, INF = float("nan"), float("inf")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X")
SIZES = (0, 1, 2, 3, 31, 32, 33, 64, 10**6, 2**31, 10**15, 2**62, 2**63, 2**64 - 1, 2**64, -1)
TEXTS = (
    "",
    "x",
    "x" * 257,
    "\x1b[2Jx",
    "two\nlines",
    "\0",
    "\ud800",
    "../../x",
    "0" * 64,
    "F" * 64,
    "0" * 63,
    "é" * 64,
)
SCALARS = (
    *(None, True, False, 0, 1, -1, 2, 7, 10**6, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1e-320, 1e-9, 1e15, 1e300, NAN, INF, -INF),
    *([], {}, [[]], [None], ["x"], [1.5], {"a": 1.0}, {"a": "x"}, {"a": [[]]}),
)
RAW = (
    "",
    " ",
    "null",
    "[]",
    "NaN",
    "9" * 5000,
    "[" * 100_000,
    '{"a":' * 50_000,
    "{}",
    '"x"',
    " " * 1_000_001,
    "{'a': 1}",
)
Draw = Callable[[st.SearchStrategy], object]

scalars = st.one_of(
    st.sampled_from(SCALARS), st.sampled_from(TEXTS), st.integers(), st.floats(), st.text(max_size=8), st.booleans()
)


@st.composite
def mutated(draw, content: RecordDict, others: Sequence[RecordDict]) -> RecordDict | None:
    """One to three mutations of a message's content. others: contents of other messages, to take records from.

    None: its bytes are no message any more.
    """
    made = RecordDict(dict(content))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        mutate = draw(st.sampled_from((_records, _scalars, _scalars, _text, _blob, _blob, _tensors, _tensors, _array)))
        made = mutate(draw, made, others)
    return _bytes(draw, made) if draw(st.integers(0, 6)) == 0 else made


def _records(draw, made: RecordDict, others: Sequence[RecordDict]) -> RecordDict:
    """Drops, renames, doubles, swaps or adds whole records."""
    names, records = list(made), dict(made)
    act = draw(st.sampled_from(("drop", "rename", "double", "swap", "foreign", "other", "add")))
    if act == "add" or not names:
        records[draw(st.sampled_from(("x", "adapter", "reply", "request", "released", "part-x", "part-" + "0" * 64)))] = draw(st.sampled_from((ConfigRecord(), MetricRecord({"a": 1}), ArrayRecord())))  # fmt: skip
        return RecordDict(records)
    name = draw(st.sampled_from(names))
    if act == "drop":
        del records[name]
    elif act in ("rename", "double"):
        record = records[name] if act == "double" else records.pop(name)
        records[draw(st.sampled_from((*names, "x", name + " ", name.upper(), "part-" + "0" * 64)))] = record
    elif act == "swap":
        other = draw(st.sampled_from(names))
        records[name], records[other] = records[other], records[name]
    elif act == "foreign":
        donor = draw(st.sampled_from(others))
        if donor:
            taken = draw(st.sampled_from(list(donor)))
            records[draw(st.sampled_from((taken, name)))] = donor[taken]
    else:
        records[name] = draw(st.sampled_from((ConfigRecord({"json": 1}), ConfigRecord({"blob": b"x"}), ArrayRecord(), MetricRecord({"json": 1.0}))))  # fmt: skip
    return RecordDict(records)


def _scalars(draw, made: RecordDict, others: Sequence[RecordDict]) -> RecordDict:
    """Changes, drops, renames, adds or takes from another message a field of a packed record."""
    name, data = _packed(draw, made)
    if not isinstance(data, dict) or not data:
        return _records(draw, made, others)
    key = draw(st.sampled_from(sorted(data)))
    act = draw(st.sampled_from(("set", "set", "set", "near", "near", "drop", "rename", "add", "swap", "foreign")))
    if act == "set":
        data[key] = draw(scalars)
    elif act == "near":
        data[key] = _near(draw, data[key])
    elif act in ("drop", "rename"):
        value = data.pop(key)
        if act == "rename":
            data[draw(st.sampled_from((key.upper(), key + " ", "x", *sorted(data)[:2])))] = value
    elif act == "add":
        data[draw(st.sampled_from(("x", "__class__", "", "\ud800", "json")))] = draw(scalars)
    elif act == "swap":
        other = draw(st.sampled_from(sorted(data)))
        data[key], data[other] = data[other], data[key]
    else:
        donor = _data(draw(st.sampled_from(others)).get(name))
        data[key] = donor.get(key, data[key]) if isinstance(donor, dict) else data[key]
    return RecordDict({**made, name: ConfigRecord({"json": json.dumps(data)})})


def _near(draw, value: object) -> object:
    """A value that is almost the true one."""
    if isinstance(value, bool) or value is None:
        return int(bool(value))
    if isinstance(value, int | float):
        return draw(st.sampled_from((value + 1, value - 1, -value, float(value), str(value), [value], value * 2, value + 1e-9, value * 1e6)))  # fmt: skip
    if isinstance(value, str):
        return draw(st.sampled_from((value[:-1], value + "0", value.upper(), value[::-1], [value], f"../{value}", "finetune", "unlearn", "a", "b")))  # fmt: skip
    if isinstance(value, list):
        longer = value * draw(st.sampled_from((2, 3, 1000)))
        return draw(st.sampled_from((value[1:], value[::-1], longer, [*value, "0" * 64], [*value, 1.5], dict.fromkeys(map(str, value), 1.0), [value])))  # fmt: skip
    if isinstance(value, dict):
        return draw(st.sampled_from(({**value, "x": 1.0}, dict.fromkeys(value, NAN), dict.fromkeys(value, 1e+300), dict.fromkeys(value, "1"), list(value), {str(i): 1.0 for i in range(101)})))  # fmt: skip
    return value


def _text(draw, made: RecordDict, others: Sequence[RecordDict]) -> RecordDict:
    """Spoils the JSON itself, or what lies beside it."""
    name, data = _packed(draw, made)
    if name is None:
        return _records(draw, made, others)
    text = json.dumps(data)
    act = draw(st.sampled_from(("raw", "cut", "flip", "twice", "beside", "bytes", "deep")))
    if act == "raw":
        text = draw(st.sampled_from(RAW))
    elif act == "cut":
        text = text[: draw(st.integers(0, len(text)))]
    elif act == "flip":
        at = draw(st.integers(0, len(text) - 1))
        text = text[:at] + draw(st.characters(codec="utf-8")) + text[at + 1 :]
    elif act == "twice" and isinstance(data, dict) and data:
        key = draw(st.sampled_from(sorted(data)))
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(draw(st.sampled_from((data[key], 1, None))))}}}"
    elif act == "deep" and isinstance(data, dict) and data:
        depth = draw(st.sampled_from((100, 500, 900, 990, 2000, 100_000)))
        text = json.dumps({**data, sorted(data)[0]: "@"}).replace('"@"', "[" * depth + "]" * depth)
    record = ConfigRecord({"json": text.encode("utf-8", "replace") if act == "bytes" else text})
    if act == "beside":
        record["x"] = 1
    return RecordDict({**made, name: record})


def _blob(draw, made: RecordDict, others: Sequence[RecordDict]) -> RecordDict:
    """Flips, cuts and lengthens a blob's bytes, or lets its header lie."""
    name, blob = _a_blob(draw, made)
    if name is None:
        return _records(draw, made, others)
    act = draw(
        st.sampled_from(("flip", "flip", "cut", "more", "length", "lie", "lie", "pad", "meta", "pickle", "deep"))
    )
    if act == "flip":
        made_of = bytearray(blob)
        for _ in range(draw(st.integers(1, 4))):
            if made_of:
                made_of[draw(st.integers(0, len(made_of) - 1))] ^= draw(st.integers(1, 255))
        blob = bytes(made_of)
    elif act == "cut":
        blob = blob[: draw(st.integers(0, len(blob)))]
    elif act == "more":
        blob += bytes(draw(st.sampled_from((1, 8, 4096, 200_000))))
    elif act == "length":
        said = draw(st.sampled_from((0, 1, 2**24, 2**31, 2**63 - 1, 2**64 - 1, max(len(blob) - 8, 0), len(blob))))
        blob = struct.pack("<Q", said) + blob[8:]
    elif act == "pickle":
        blob = b"\x80\x04\x95" + blob
    elif act == "deep":
        blob = _blob_of(b'{"x":' + b"[" * 20_000, b"")
    else:
        blob = _lying(draw, act, blob)
    return RecordDict({**made, name: _packed_blob(blob)})


def _lying(draw, act: str, blob: bytes) -> bytes:
    header, data = _parts(blob)
    if not header:
        return blob
    if act == "pad":
        return _blob_of(json.dumps(header).encode() + b" " * draw(st.integers(0, 9)), data)
    if act == "meta":
        return _blob_of(json.dumps({"__metadata__": draw(st.sampled_from(({"a": "b"}, {"a": 1}, [], {"a": "x" * 10_000}))), **header}).encode(), data)  # fmt: skip
    name = draw(st.sampled_from(sorted(header)))
    entry = header[name] if isinstance(header[name], dict) else {}
    lie = draw(st.sampled_from(("dtype", "shape", "offsets", "drop", "field")))
    if lie == "dtype":
        entry = {**entry, "dtype": draw(st.sampled_from(DTYPES))}
    elif lie == "shape":
        entry = {**entry, "shape": draw(st.lists(st.sampled_from(SIZES), max_size=4))}
    elif lie == "offsets":
        entry = {**entry, "data_offsets": draw(st.lists(st.sampled_from((*SIZES, len(data))), min_size=1, max_size=3))}
    elif lie == "drop":
        entry = {}
    else:
        entry = {**entry, "x": 1}
    return _blob_of(json.dumps({**header, name: entry}).encode(), data)


def _tensors(draw, made: RecordDict, others: Sequence[RecordDict]) -> RecordDict:
    """A sound blob of other tensors: renamed, gone, doubled, of other shapes, dtypes and values."""
    record, blob = _a_blob(draw, made)
    header, data = _parts(blob or b"")
    header.pop("__metadata__", None)
    if record is None or not header or not all(isinstance(entry, dict) and "data_offsets" in entry for entry in header.values()):  # fmt: skip
        return _records(draw, made, others)
    tensors = {key: [entry.get("dtype"), list(entry.get("shape", ())), data[slice(*entry["data_offsets"][:2])]] for key, entry in header.items()}  # fmt: skip
    name = draw(st.sampled_from(sorted(tensors)))
    for _ in range(draw(st.sampled_from((1, 1, 2)))):
        _change(draw, tensors, name if name in tensors else next(iter(tensors), ""))
    return RecordDict({**made, record: _packed_blob(_saved(tensors))})


def _change(draw, tensors: dict[str, list], name: str) -> None:
    if name not in tensors:
        return
    dtype, shape, raw = tensors[name]
    act = draw(st.sampled_from(("rename", "drop", "double", "shape", "dtype", "value", "value", "value", "grow", "none", "turn")))  # fmt: skip
    if act == "rename":
        tensors[draw(st.sampled_from(("x", name + "\n", name.upper(), name.replace("lora_A", "lora_B"), "\x1b[2J")))] = tensors.pop(name)  # fmt: skip
    elif act == "drop":
        del tensors[name]
    elif act == "double":
        tensors[draw(st.sampled_from(("x", f"x.{name}", "x" * 5000)))] = [dtype, shape, raw]
    elif act == "shape":
        tensors[name] = [dtype, draw(st.sampled_from(([*shape, 1], [1, *shape], shape[::-1], [len(raw) // 4], [0, *shape[1:]], [0, 10**15], [0, 10**7], [10**7, 0], shape))), raw]  # fmt: skip
    elif act == "dtype":
        tensors[name] = [draw(st.sampled_from(DTYPES)), shape, raw]
    elif act == "value":
        value = draw(st.one_of(st.sampled_from((NAN, INF, -INF, 0.0, -0.0, 3e38, 1e15, 9e14, 1e-40, 1e3)), st.floats(width=32)))  # fmt: skip
        places = max(len(raw) // 4, 1)
        at = draw(st.integers(0, places - 1))
        everywhere = draw(st.booleans())
        one = struct.pack("<f", value)
        tensors[name] = [dtype, shape, one * places if everywhere else raw[: 4 * at] + one + raw[4 * at + 4 :]]
    elif act == "grow":
        by = draw(st.sampled_from((2, 3, 50)))
        tensors[name] = [dtype, [by * (shape[0] if shape else 1), *shape[1:]], raw * by]
    elif act == "none":
        tensors.clear()
    else:
        other = draw(st.sampled_from(sorted(tensors)))
        tensors[name], tensors[other] = tensors[other], tensors[name]


def _saved(tensors: dict[str, list]) -> bytes:
    """Lays tensors out one after another; where shape and bytes disagree, the bytes are cut or filled up."""
    sizes = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
    header, data = {}, b""
    for name, (dtype, shape, raw) in tensors.items():
        count = 1
        for size in shape:
            count *= size
        wanted = count * sizes.get(dtype, 1)
        raw = (raw + bytes(max(wanted - len(raw), 0)))[:wanted] if wanted <= 10**6 else raw
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return _blob_of(json.dumps(header).encode(), data)


def _array(draw, made: RecordDict, others: Sequence[RecordDict]) -> RecordDict:
    """Lets the array around a blob lie, or puts more arrays beside it."""
    name, blob = _a_blob(draw, made)
    if name is None:
        return _records(draw, made, others)
    dtype = draw(st.sampled_from(("uint8", "float64", "", "object")))
    shape = draw(st.sampled_from(((len(blob),), (0,), (10**15,), (-1,), ())))
    stype = draw(st.sampled_from(("safetensors", "safetensors", "numpy.ndarray", "pickle", "")))
    key = draw(st.sampled_from(("blob", "blob", "x", "")))
    arrays = {key: Array(dtype=dtype, shape=shape, stype=stype, data=blob)}
    if draw(st.integers(0, 3)) == 0:
        arrays["y"] = Array(dtype="uint8", shape=(1,), stype="safetensors", data=blob)
    return RecordDict({**made, name: ArrayRecord(arrays)})


def _bytes(draw, made: RecordDict) -> RecordDict | None:
    """Flips or cuts the bytes of the whole message; None where Flower cannot read them any more."""
    try:
        sent = bytearray(recorddict_to_proto(made).SerializeToString())
    except (ValueError, TypeError):  # a lone surrogate, an integer beyond 64 bits: it cannot be sent
        return None
    if draw(st.booleans()):
        sent = sent[: draw(st.integers(0, len(sent)))]
    for _ in range(draw(st.integers(0, 3)) if sent else 0):
        sent[draw(st.integers(0, len(sent) - 1))] ^= draw(st.integers(1, 255))
    try:
        return recorddict_from_proto(ProtoRecordDict.FromString(bytes(sent)))
    except Exception:  # whatever Flower's own readers raise: the grids answer with an error
        return None


def _packed(draw, made: RecordDict) -> tuple[str | None, object]:
    names = [name for name, record in made.items() if _data(record) is not None]
    if not names:
        return None, None
    name = draw(st.sampled_from(names))
    return name, _data(made[name])


def _data(record: object) -> object:
    if not isinstance(record, ConfigRecord) or not isinstance(record.get("json"), str):
        return None
    try:
        return json.loads(record["json"])
    except (ValueError, RecursionError):
        return None


def _a_blob(draw, made: RecordDict) -> tuple[str | None, bytes]:
    names = [name for name, record in made.items() if isinstance(record, ArrayRecord) and len(record)]
    if not names:
        return None, b""
    name = draw(st.sampled_from(names))
    return name, bytes(next(iter(made[name].values())).data)


def _packed_blob(blob: bytes) -> ArrayRecord:
    return ArrayRecord({"blob": Array(dtype="uint8", shape=(len(blob),), stype="safetensors", data=blob)})


def _blob_of(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _parts(blob: bytes) -> tuple[dict, bytes]:
    """Gives header and data; empty for what has none."""
    if len(blob) < 8:
        return {}, b""
    (size,) = struct.unpack("<Q", blob[:8])
    try:
        header = json.loads(blob[8 : 8 + size])
    except (ValueError, RecursionError):
        return {}, b""
    return (header, blob[8 + size :]) if isinstance(header, dict) else ({}, b"")
