"""The fingerprint of a base model: the sha256 of its tensors as they are stored, before any cast."""

import functools
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fedunlearn.errors import UserError


def fingerprint_base(folder: Path) -> str:
    """Gives the sha256 (hex) of all stored tensors in name order, whatever the shards.

    Raises UserError where the folder has no safetensors file or one that cannot be read.
    """
    files = _weight_files(folder)
    if not files:
        raise UserError(
            f"base model {str(folder)!r} has no model.safetensors, which its fingerprint is taken from: save the model once with save_pretrained"
        )
    return _fingerprint(tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files))


def _weight_files(folder: Path) -> list[Path]:
    """The files transformers would load: those of the index, or the single one; other safetensors beside them do not count."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    single = folder / "model.safetensors"
    return [single] if single.is_file() else []


@functools.lru_cache(maxsize=8)
def _fingerprint(files: tuple[tuple[str, int, int], ...]) -> str:
    try:
        where = {name: path for path, _, _ in files for name in _names(path)}
        digest = hashlib.sha256()
        for name in sorted(where):
            with safe_open(where[name], framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
    except SafetensorError as error:
        raise UserError(
            f"base model file in {str(Path(files[0][0]).parent)!r} is corrupt or truncated ({error}): fetch the model again"
        ) from error


def _names(path: str) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())
