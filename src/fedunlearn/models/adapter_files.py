"""Adapters on disk: PEFT folders that PEFT itself can load, with a file of ours that proves what they are."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

import fedunlearn
from fedunlearn.errors import UserError
from fedunlearn.files import read_object, whole_folder
from fedunlearn.models.experts import join_experts, split_experts
from fedunlearn.models.export import Stacked
from fedunlearn.models.soundness import check_sound, faults_of_config, faults_of_pairs
from fedunlearn.records.adapter import Adapter, hash_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROOF = "fedunlearn.json"
MOVES = "base_model_name_or_path"
"""The key of an adapter's config that users may change: where the base lies is no part of what the adapter is."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Logits recorded when an adapter was saved: last position of a few fixed rows, at fixed ids, [rows][ids], in the base's dtype; a quantised base is told with it (models.resident)."""

    dtype: str
    logits: tuple[tuple[float, ...], ...]


def save_adapter(folder: Path, adapter: Adapter, probe: Probe | None = None, stacked: Stacked | None = None) -> None:
    """Writes a PEFT folder atomically: weights, config with sorted keys and lists, and our proof (hashes of numbers and config, probe, version).

    stacked: what the trainable factors were, where the adapter is a stack. Raises ValueError for an adapter with a side-car: PEFT
    would load the rest without it.
    """
    if adapter.sidecar:
        raise ValueError("an adapter with a side-car is no PEFT folder: export it first")
    proof = {
        "version": fedunlearn.__version__,
        "tensor_hash": adapter.tensor_hash,
        "config_hash": hash_config(adapter.peft_config),
        "base_fingerprint": adapter.base_fingerprint,
        "stacked": None if stacked is None else asdict(stacked),
        "probe": None if probe is None else {"dtype": probe.dtype, "logits": [list(row) for row in probe.logits]},
    }
    with whole_folder(folder) as temporary:
        blob = safetensors.torch.save(join_experts(adapter.tensors, adapter.peft_config), metadata={"format": "pt"})
        (temporary / WEIGHTS).write_bytes(blob)
        (temporary / CONFIG).write_text(
            json.dumps(dict(adapter.peft_config), indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
        (temporary / PROOF).write_text(json.dumps(proof, sort_keys=True) + "\n", encoding="utf-8")


def hash_config(peft_config: Mapping[str, object]) -> str:
    """Gives the sha256 of a PEFT config as it is saved, but for the base's name: users move bases."""
    known = json.loads(json.dumps({key: value for key, value in peft_config.items() if key != MOVES}))
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def load_adapter(folder: Path) -> tuple[Adapter, Probe | None]:
    """Reads a PEFT folder that can be computed with: read_folder, and models.soundness. Raises UserError as they do."""
    adapter, probe = read_folder(folder)
    check_sound(adapter, str(folder))
    return adapter, probe


def read_folder(folder: Path) -> tuple[Adapter, Probe | None]:
    """Reads a PEFT folder as it is, AdaLoRA's checkpoints among them, and checks it against our proof where there is one (a foreign folder has none: fingerprint None).

    Raises UserError for corrupt or truncated weights, a damaged config or proof, or tensors or a config that are not those that were saved.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise UserError(
                f"adapter {str(folder)!r} lacks {name}: name a complete PEFT folder (weights as safetensors, not .bin)"
            )
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
        peft_config = read_object(folder / CONFIG)
        proof = _proof(read_object(folder / PROOF)) if (folder / PROOF).is_file() else None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"adapter {str(folder)!r} is corrupt or truncated ({error}): copy it again, or take an earlier rounds/<n>/adapter"
        ) from error
    if not tensors:
        raise UserError(f"adapter {str(folder)!r} holds no tensor: name a complete PEFT folder")
    tensors = _split(folder, tensors, peft_config)
    if proof is None:
        return Adapter(tensors, peft_config, None), None
    if hash_tensors(tensors) != proof.tensor_hash:
        raise UserError(
            f"adapter {str(folder)!r} is not what was saved: {WEIGHTS} does not match the hash in {PROOF}; copy it again"
        )
    if proof.config_hash not in (None, hash_config(peft_config)):
        raise UserError(
            f"adapter {str(folder)!r} is not what was saved: {CONFIG} does not match the hash in {PROOF} (only {MOVES} may change); copy it again, "
            f"or delete {PROOF} where the edit is meant: it is a foreign adapter then"
        )
    return Adapter(tensors, peft_config, proof.base_fingerprint), proof.probe


def _split(
    folder: Path, tensors: dict[str, torch.Tensor], peft_config: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    """Fused experts apart; what could not be cut is told."""
    if not peft_config.get("target_parameters"):
        return tensors
    faults = [*faults_of_config(peft_config), *faults_of_pairs(tensors)]
    if faults:
        raise UserError(*(f"adapter {str(folder)!r}: {fault}" for fault in faults))
    return split_experts(tensors, peft_config)


def saved_hash(folder: Path | None) -> str:
    """Gives the sha256 of an adapter's numbers as they lie in a PEFT folder, `none` without one. A stack is loaded as another adapter, so this is not that one's hash."""
    return "none" if folder is None else load_adapter(folder)[0].tensor_hash


def stacked_of(folder: Path) -> Stacked | None:
    """Gives what the trainable factors of a stacked adapter were; None for a plain one, and for a foreign folder. Raises UserError as load_adapter does."""
    proof = _proof_of(folder)
    return None if proof is None else proof.stacked


def proves_config(folder: Path) -> bool:
    """Whether the proof in a folder tells of its config too: folders of earlier versions and foreign ones have none that does. Raises UserError as load_adapter does."""
    proof = _proof_of(folder)
    return proof is not None and proof.config_hash is not None


def _proof_of(folder: Path) -> "_Proof | None":
    try:
        return _proof(read_object(folder / PROOF)) if (folder / PROOF).is_file() else None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"adapter {str(folder)!r} is corrupt ({error}): copy it again") from error


@dataclass(frozen=True, kw_only=True)
class _Proof:
    tensor_hash: str
    base_fingerprint: str | None
    probe: Probe | None
    stacked: Stacked | None
    config_hash: str | None


def _proof(saved: Mapping[str, object]) -> _Proof:
    """Raises KeyError, TypeError or ValueError where the proof is not what save_adapter writes."""
    missing = [key for key in ("tensor_hash", "base_fingerprint") if key not in saved]
    if missing:
        raise ValueError(f"{PROOF} lacks {missing[0]!r}")
    fingerprint, config_hash = saved["base_fingerprint"], saved.get("config_hash")
    return _Proof(
        tensor_hash=str(saved["tensor_hash"]),
        base_fingerprint=None if fingerprint is None else str(fingerprint),
        probe=_read_probe(saved.get("probe")),
        stacked=_read_stacked(saved.get("stacked")),
        config_hash=None if config_hash is None else str(config_hash),
    )


def _read_stacked(saved: object) -> Stacked | None:
    if saved is None:
        return None
    if not isinstance(saved, dict) or set(saved) != {"r", "lora_alpha"}:
        raise ValueError(f"what is said of the stack in {PROOF} is none of ours")
    return Stacked(r=int(saved["r"]), lora_alpha=float(saved["lora_alpha"]))


def _read_probe(saved: object) -> Probe | None:
    if saved is None:
        return None
    if not isinstance(saved, dict) or set(saved) != {"dtype", "logits"}:
        raise ValueError(f"the probe in {PROOF} is none of ours")
    return Probe(dtype=str(saved["dtype"]), logits=tuple(tuple(map(float, row)) for row in saved["logits"]))
