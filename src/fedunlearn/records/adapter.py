"""The adapter as it travels: LoRA tensors by name, the PEFT config they belong to, and the base they belong on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

Tensors = Mapping[str, torch.Tensor]
A, B = ".lora_A.weight", ".lora_B.weight"
"""How the names of a pair's two factors end; every other tensor of an adapter is plain."""
MAGNITUDE, B_BIAS = ".lora_magnitude_vector", ".lora_B.bias"
"""How those of DoRA's magnitudes and of LoRA's own biases end, which are plain tensors."""


def hash_tensors(tensors: Tensors) -> str:
    """Gives the sha256 (hex) of names, dtypes, shapes and bytes, in name order; the device and the order of the mapping do not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Weights:
    """An adapter's numbers alone. factors: the trainable ones by name. sidecar: what lies frozen beside them, same names, ranks of its own, scale 1."""

    factors: Tensors
    sidecar: Tensors = field(default_factory=dict)

    @cached_property
    def hash(self) -> str:
        """sha256 of all of it; without a side-car that of the factors."""
        own = hash_tensors(self.factors)
        return own if not self.sidecar else hashlib.sha256(f"{own} {hash_tensors(self.sidecar)}".encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is trained of one base, and optionally a frozen side-car beside it.

    tensors: PEFT state-dict name -> float32 or bfloat16 tensor on the CPU, in name order: pairs of LoRA factors (fused experts as one
    pair each, see models.experts) and plain tensors (magnitudes, biases, saved modules, AdaLoRA's triplets). peft_config: adapter_config.json
    as PEFT writes it, plain JSON values. base_fingerprint: sha256 of the base's stored tensors; None in a foreign folder.
    sidecar: see Weights. Equality and hash go by numbers (bit by bit), config and fingerprint.
    """

    tensors: Tensors
    peft_config: Mapping[str, object]
    base_fingerprint: str | None
    sidecar: Tensors = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("tensors", "sidecar"):
            unordered = getattr(self, key)
            object.__setattr__(self, key, {name: unordered[name] for name in sorted(unordered)})

    @cached_property
    def weights(self) -> Weights:
        """The numbers alone."""
        return Weights(self.tensors, self.sidecar)

    @property
    def tensor_hash(self) -> str:
        """sha256 of the numbers alone."""
        return self.weights.hash

    @cached_property
    def layout(self) -> str:
        """sha256 of the names and shapes of its tensors, whatever their values."""
        told = json.dumps([[name, list(tensor.shape)] for name, tensor in self.tensors.items()])
        return hashlib.sha256(told.encode()).hexdigest()

    def replace(self, tensors: Tensors, sidecar: Tensors | None = None) -> "Adapter":
        """Gives the same adapter with other values; sidecar None: its own stays. Raises ValueError naming the first tensor whose name or shape differs."""
        if sorted(tensors) != list(self.tensors):
            odd = sorted(set(tensors) ^ set(self.tensors))
            raise ValueError(f"adapter tensors differ in name, first {odd[0]!r}")
        for name, tensor in self.tensors.items():
            if tensors[name].shape != tensor.shape:
                raise ValueError(
                    f"adapter tensor {name!r} has shape {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
                )
        return Adapter(tensors, self.peft_config, self.base_fingerprint, self.sidecar if sidecar is None else sidecar)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[str, str, str | None]:
        return self.tensor_hash, json.dumps(self.peft_config, sort_keys=True), self.base_fingerprint
