"""Mutations of real messages: records, scalars, safetensors blobs and the bytes of the whole, drawn by hypothesis."""

import json
from collections.abc import Sequence

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from helpers_blobs import INF, NAN, OF_BLOBS, other_tensors, spoil_blob
from hypothesis import strategies as st

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
        mutate = draw(st.sampled_from((_records, _scalars, _scalars, _text, spoil_blob, *OF_BLOBS, other_tensors)))
        found = mutate(draw, made) if mutate in OF_BLOBS else mutate(draw, made, others)
        made = _records(draw, made, others) if found is None else found
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


def _scalars(draw, made: RecordDict, others: Sequence[RecordDict]) -> RecordDict | None:
    """Changes, drops, renames, adds or takes from another message a field of a packed record."""
    name, data = _packed(draw, made)
    if not isinstance(data, dict) or not data:
        return None
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


def _text(draw, made: RecordDict, others: Sequence[RecordDict]) -> RecordDict | None:
    """Spoils the JSON itself, or what lies beside it."""
    name, data = _packed(draw, made)
    if name is None:
        return None
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
