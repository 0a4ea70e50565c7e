"""Mutations of the safetensors blob in a message: bytes, headers that lie, sound blobs of other tensors, the array around it.

Each gives None for a message that has no blob.
"""

import json
import struct

from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import strategies as st

NAN, INF = float("nan"), float("inf")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X")
SIZES = (0, 1, 2, 3, 31, 32, 33, 64, 10**6, 2**31, 10**15, 2**62, 2**63, 2**64 - 1, 2**64, -1)


def spoil_blob(draw, made: RecordDict) -> RecordDict | None:
    """Flips, cuts and lengthens a blob's bytes, or lets its header lie."""
    name, blob = _a_blob(draw, made)
    if name is None:
        return None
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


def other_tensors(draw, made: RecordDict) -> RecordDict | None:
    """A sound blob of other tensors: renamed, gone, doubled, of other shapes, dtypes and values."""
    record, blob = _a_blob(draw, made)
    header, data = _parts(blob or b"")
    header.pop("__metadata__", None)
    if record is None or not header or not all(isinstance(entry, dict) and "data_offsets" in entry for entry in header.values()):  # fmt: skip
        return None
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


def other_arrays(draw, made: RecordDict) -> RecordDict | None:
    """Lets the array around a blob lie, or puts more arrays beside it."""
    name, blob = _a_blob(draw, made)
    if name is None:
        return None
    dtype = draw(st.sampled_from(("uint8", "float64", "", "object")))
    shape = draw(st.sampled_from(((len(blob),), (0,), (10**15,), (-1,), ())))
    stype = draw(st.sampled_from(("safetensors", "safetensors", "numpy.ndarray", "pickle", "")))
    key = draw(st.sampled_from(("blob", "blob", "x", "")))
    arrays = {key: Array(dtype=dtype, shape=shape, stype=stype, data=blob)}
    if draw(st.integers(0, 3)) == 0:
        arrays["y"] = Array(dtype="uint8", shape=(1,), stype="safetensors", data=blob)
    return RecordDict({**made, name: ArrayRecord(arrays)})


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


OF_BLOBS = (spoil_blob, other_tensors, other_arrays)
