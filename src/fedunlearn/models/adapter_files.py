"""Adapters on disk: PEFT folders that PEFT itself can load, with a file of ours that proves what they are."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError

import fedunlearn
from fedunlearn.errors import UserError
from fedunlearn.files import whole_folder
from fedunlearn.records.adapter import Adapter, hash_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROOF = "fedunlearn.json"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Logits recorded when an adapter was saved: last position of a few fixed rows, at fixed ids, [rows][ids], in the base's dtype."""

    dtype: str
    logits: tuple[tuple[float, ...], ...]


def save_adapter(folder: Path, adapter: Adapter, probe: Probe | None = None) -> None:
    """Writes a PEFT folder atomically: weights, config with sorted keys and lists, and our proof (hashes, probe, version)."""
    proof = {
        "version": fedunlearn.__version__,
        "tensor_hash": adapter.tensor_hash,
        "base_fingerprint": adapter.base_fingerprint,
        "probe": None if probe is None else {"dtype": probe.dtype, "logits": [list(row) for row in probe.logits]},
    }
    with whole_folder(folder) as temporary:
        blob = safetensors.torch.save(dict(adapter.tensors), metadata={"format": "pt"})
        (temporary / WEIGHTS).write_bytes(blob)
        (temporary / CONFIG).write_text(
            json.dumps(dict(adapter.peft_config), indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        (temporary / PROOF).write_text(json.dumps(proof, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(folder: Path) -> tuple[Adapter, Probe | None]:
    """Reads a PEFT folder and checks the tensors against our proof where there is one (a foreign folder has none: fingerprint None).

    Raises UserError for corrupt or truncated weights, a damaged config, or tensors that are not those that were saved.
    """
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        peft_config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        proof = json.loads((folder / PROOF).read_text(encoding="utf-8")) if (folder / PROOF).is_file() else None
    except FileNotFoundError as error:
        raise UserError(
            f"adapter {str(folder)!r} lacks {Path(str(error.filename)).name or WEIGHTS}: name a complete PEFT folder"
        ) from error
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"adapter {str(folder)!r} is corrupt or truncated ({error}): copy it again, or take an earlier rounds/<n>/adapter"
        ) from error
    if not tensors:
        raise UserError(f"adapter {str(folder)!r} holds no tensor: name a complete PEFT folder")
    adapter = Adapter(tensors, peft_config, None if proof is None else proof["base_fingerprint"])
    if proof is not None and hash_tensors(tensors) != proof["tensor_hash"]:
        raise UserError(
            f"adapter {str(folder)!r} is not what was saved: {WEIGHTS} does not match the hash in {PROOF}; copy it again"
        )
    return adapter, _read_probe(proof)


def _read_probe(proof: Mapping[str, object] | None) -> Probe | None:
    probe = proof.get("probe") if proof else None
    if not isinstance(probe, dict):
        return None
    return Probe(dtype=str(probe["dtype"]), logits=tuple(tuple(row) for row in probe["logits"]))
