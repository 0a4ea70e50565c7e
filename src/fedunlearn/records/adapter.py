"""The adapter as it travels: LoRA tensors by name, the PEFT config they belong to, and the base they belong on."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

Tensors = Mapping[str, torch.Tensor]


def hash_tensors(tensors: Tensors) -> str:
    """Gives the sha256 (hex) of names, dtypes, shapes and bytes, in name order; the device and the order of the mapping do not matter."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Adapter:
    """Trainable LoRA factors on one base.

    tensors: PEFT state-dict name -> float32 or bfloat16 tensor on the CPU, in name order. peft_config: adapter_config.json
    as PEFT writes it, plain JSON values. base_fingerprint: sha256 of the base's stored tensors; None in a foreign folder.
    Equality and hash go by tensors (bit by bit), config and fingerprint.
    """

    tensors: Tensors
    peft_config: Mapping[str, object]
    base_fingerprint: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", {name: self.tensors[name] for name in sorted(self.tensors)})

    @cached_property
    def tensor_hash(self) -> str:
        """sha256 of the tensors alone: what names a reference adapter on the wire."""
        return hash_tensors(self.tensors)

    @property
    def num_parameters(self) -> int:
        """Entries of all tensors together."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    def replace(self, tensors: Tensors) -> "Adapter":
        """Gives the same adapter with other values. Raises ValueError naming the first tensor whose name or shape differs."""
        if sorted(tensors) != list(self.tensors):
            odd = sorted(set(tensors) ^ set(self.tensors))
            raise ValueError(f"adapter tensors differ in name, first {odd[0]!r}")
        for name, tensor in self.tensors.items():
            if tensors[name].shape != tensor.shape:
                raise ValueError(
                    f"adapter tensor {name!r} has shape {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
                )
        return Adapter(tensors, self.peft_config, self.base_fingerprint)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Adapter) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[str, str, str | None]:
        return self.tensor_hash, json.dumps(self.peft_config, sort_keys=True), self.base_fingerprint
