"""A client's own rank inside the one adapter of the model: rows beyond it are zero and stay zero, and its scale is set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from fedunlearn.models.adapter_tensors import ACTIVE, live_tensors, lora_layers
from fedunlearn.models.lora import REFERENCE
from fedunlearn.records.adapter import A, B, Tensors
from fedunlearn.records.shape import ClientShape


def padded(model: PeftModel, tensors: Tensors) -> Tensors:
    """Gives factors of a smaller rank at the model's: zero rows below A, zero columns right of B; all others come back as they are.

    A zero row of A beside a zero column of B has no gradient, and weight decay leaves it zero.
    """
    live = live_tensors(model)
    return {
        name: _padded(name, tensor, live[name].shape) if name in live else tensor for name, tensor in tensors.items()
    }


def _padded(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if not name.endswith((A, B)):
        return tensor
    along = 0 if name.endswith(A) else 1
    if tensor.dim() != len(shape) or tensor.shape[1 - along] != shape[1 - along]:
        return tensor  # whoever writes it says so; padded, no rows of a great length would become some
    missing = shape[along] - tensor.shape[along]
    if missing <= 0:
        return tensor
    return F.pad(tensor, (0, 0, 0, missing) if along == 0 else (0, missing))


def cut(tensors: Tensors, rank: int) -> Tensors:
    """Gives the first `rank` rows of every A and columns of every B; plain tensors as they are."""
    return {name: _cut(name, tensor, rank) for name, tensor in tensors.items()}


def _cut(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    if not name.endswith((A, B)):
        return tensor
    return (tensor[:rank] if name.endswith(A) else tensor[:, :rank]).contiguous()


@contextmanager
def scaled_for(model: PeftModel, shape: ClientShape | None) -> Iterator[None]:
    """Inside the block the adapter (and the reference's) acts with the client's scale; None: with its own."""
    before = {layer: dict(layer.scaling) for _, layer in lora_layers(model)}
    try:
        for layer in before if shape is not None else ():
            _set(layer.scaling, shape)
        yield
    finally:
        for layer, scaling in before.items():
            layer.scaling.update(scaling)


def _set(scaling: dict[str, float], shape: ClientShape | None) -> None:
    for name in (ACTIVE, REFERENCE):
        if shape is not None and name in scaling:
            scaling[name] = shape.scale


def module_scales(model: PeftModel) -> Mapping[str, float]:
    """Gives the scale of every LoRA layer by its path in the base, as aggregation.factors names modules."""
    return {path.removeprefix("base_model.model."): scale for path, scale in scales_in(model).items()}


def scales_in(model: nn.Module) -> Mapping[str, float]:
    """Gives the scale of every LoRA layer by its path, as it acts now."""
    return {path: float(layer.scaling[ACTIVE]) for path, layer in lora_layers(model)}
