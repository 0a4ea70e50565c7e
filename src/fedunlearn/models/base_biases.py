"""The base's own biases where they are trained: PEFT keeps one set for all adapters, so the values of the others are held here and change places."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import nn

from fedunlearn.records.adapter import Tensors


@dataclass(eq=False)
class _Biases:
    """By their names in the model: the parameters, their values as the base is stored, and those of adapters that do not act."""

    parameters: dict[str, nn.Parameter]
    stored: dict[str, torch.Tensor]
    held: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


_KEPT: "WeakKeyDictionary[PeftModel, _Biases]" = WeakKeyDictionary()


def keep_stored(model: PeftModel, parameters: dict[str, nn.Parameter]) -> None:
    """Remembers these parameters of the base, with the values that they have now: called once, before anything is trained."""
    if parameters:
        stored = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        _KEPT[model] = _Biases(parameters, stored)


def stored_biases(model: PeftModel) -> Tensors:
    """Gives the trained biases as the base is stored, by name; empty where none is trained."""
    return dict(_KEPT[model].stored) if model in _KEPT else {}


def held_biases(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """Gives the values that are held for an adapter that does not act, the stored ones at first; writing into them is what changes them."""
    if model not in _KEPT:
        return {}
    kept = _KEPT[model]
    if name not in kept.held:
        kept.held[name] = {key: tensor.clone() for key, tensor in kept.stored.items()}
    return kept.held[name]


@contextmanager
def biases_of(model: PeftModel, name: str) -> Iterator[None]:
    """Inside the block the biases have the values held for that adapter; afterwards their own again, bit by bit.

    Storage changes places, nothing is written: a graph that was built before the block keeps what it needs for its backward.
    """
    held = held_biases(model, name)
    own = {key: _KEPT[model].parameters[key].data for key in held}
    try:
        for key, tensor in held.items():
            _KEPT[model].parameters[key].data = tensor
        yield
    finally:
        for key, tensor in own.items():
            _KEPT[model].parameters[key].data = tensor
