"""What a sound message is, said without the code that judges it: plain JSON, struct and numpy."""

import hashlib
import json
import math
import struct

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

COUNTS = ("num_steps", "num_tokens", "num_reference_tokens")
REPLY_KEYS = {
    *(
        "run_id",
        "round",
        "client_id",
        "base_fingerprint",
        "num_examples",
        "num_trained",
        *COUNTS,
        "seconds",
        "seconds_loading",
        "loss",
    ),
    *("loss_trace", "memory", "stopped", "missing"),
}
CODES = frozenset(
    ["stale_round", "base_mismatch", "num_examples", "missing_key", "extra_key", "shape", "dtype", "nan", "memory", "norm", "loss", "wire_size", "unreadable", "extra_metric", "missing_part", "crashed", "timeout"]
)  # fmt: skip
"""Every reason that the history may hold for a refused reply (docs of the gate)."""
SOUND_DTYPE, LARGEST_ENTRY = "F32", 1e15


def scalars_of(record: object) -> dict | None:
    """The one JSON object of a packed record; None for anything else."""
    if not isinstance(record, ConfigRecord) or set(record) != {"json"} or not isinstance(record["json"], str):
        return None
    try:
        data = json.loads(record["json"])
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def blob_in(record: object) -> bytes | None:
    """The one blob of a packed adapter; None for anything else."""
    if not isinstance(record, ArrayRecord) or list(record) != ["blob"] or record["blob"].stype != "safetensors":
        return None
    return bytes(record["blob"].data)


def tensors_in(blob: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Name -> (dtype, shape, bytes) by the safetensors format: no byte belongs to nobody or to two. None where it is none."""
    try:
        (size,) = struct.unpack("<Q", blob[:8])
        header = json.loads(blob[8 : 8 + size].decode())
        data = blob[8 + size :]
        if not all(isinstance(text, str) for text in (header.pop("__metadata__", None) or {}).values()):
            return None
        found = {name: _entry(one["dtype"], one["shape"], *one["data_offsets"]) for name, one in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        return None
    at = 0
    for _, _, start, end in sorted(found.values(), key=lambda one: one[2:]):
        if start != at or end < start:
            return None
        at = end
    if at != len(data) or size > len(blob) - 8:
        return None
    return {name: (dtype, shape, data[start:end]) for name, (dtype, shape, start, end) in found.items()}


def _entry(dtype: str, shape: list, start: int, end: int) -> tuple:
    """One tensor of a header; TypeError where there are not two offsets."""
    return dtype, tuple(shape), start, end


def is_count(value: object) -> bool:
    """A whole number that is no bool."""
    return type(value) is int


def is_number(value: object) -> bool:
    """A finite number of seconds or the like."""
    return type(value) in (int, float) and math.isfinite(value)


def good_reply(content: RecordDict, sent, *, run_id, number, client, base, owned, most, names, ratio) -> bool:
    """Whether a train reply is as good as an honest one.

    sent: float32 arrays by name, as the client got them, all of them trained. owned: rows it declared; most: rows it can have trained on. names: of
    what its method remembers. ratio: how far it may move its factors, over their own norm.
    """
    said, blob = scalars_of(content.get("reply")), blob_in(content.get("adapter"))
    if said is None or blob is None or set(content) != {"reply", "adapter"} or set(said) != REPLY_KEYS:
        return False
    who = (said["run_id"], said["round"], said["client_id"], said["base_fingerprint"])
    counts = is_count(said["num_examples"]) and is_count(said["num_trained"])
    return (
        who == (run_id, number, client, base)
        and is_count(said["round"])
        and is_count(said["client_id"])
        and counts
        and said["num_examples"] == owned
        and 0 < said["num_trained"] <= most
        and all(is_count(said[key]) and 0 <= said[key] < 1e15 for key in COUNTS)
        and all(is_number(said[key]) and said[key] >= 0 for key in ("seconds", "seconds_loading"))
        and type(said["loss"]) in (int, float)
        and isinstance(said["memory"], dict)
        and set(said["memory"]) == set(names)
        and all(is_number(value) for value in said["memory"].values())
        and said["missing"] == []
        and isinstance(said["stopped"], str)
        and _good_tensors(tensors_in(blob), sent, ratio)
    )


def _good_tensors(tensors, sent, ratio) -> bool:
    if tensors is None or set(tensors) != set(sent):
        return False
    moved = 0.0
    for name, before in sent.items():
        dtype, shape, raw = tensors[name]
        if dtype != SOUND_DTYPE or shape != before.shape or len(raw) != before.size * 4:
            return False
        after = np.frombuffer(raw, "<f4").reshape(shape).astype(np.float64)
        if not np.isfinite(after).all() or np.abs(after).max() >= LARGEST_ENTRY:
            return False
        moved += float(np.square(after - before).sum())
    start = math.sqrt(sum(float(np.square(before.astype(np.float64)).sum()) for before in sent.values()))
    return math.sqrt(moved) <= ratio * start * (1 + 1e-9)


NUMPY_TORCH = {"F32": "torch.float32", "F64": "torch.float64", "F16": "torch.float16", "BF16": "torch.bfloat16", "I64": "torch.int64", "I32": "torch.int32", "U8": "torch.uint8", "BOOL": "torch.bool", "C64": "torch.complex64", "F8_E4M3": "torch.float8_e4m3fn"}  # fmt: skip


def part_name(blob: bytes) -> str | None:
    """The hash a part is named by: sha256 over name, dtype, shape and bytes of its tensors in name order. None where there is none to be had."""
    tensors = tensors_in(blob)
    if tensors is None:
        return None
    digest = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, raw = tensors[name]
        digest.update(f"{name} {NUMPY_TORCH.get(dtype, dtype)} {shape}\n".encode("utf-8", "surrogatepass"))
        digest.update(raw)
    return digest.hexdigest()
