"""The side-car: frozen factors of their own rank beside each LoRA layer, added to its output; base and trainable factors stay as they are."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from fedunlearn.errors import UserError
from fedunlearn.records.adapter import Tensors


@dataclass(eq=False)
class _SideCar:
    """The hook of one LoRA layer. held: adapter name -> (A [R, d_in], B [d_out, R]); active: whose is added."""

    active: str
    held: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __call__(self, layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if self.active not in self.held:
            return output
        a, b = self.held[self.active]
        return output + F.linear(F.linear(inputs[0].to(a.dtype), a), b).to(output.dtype)


_HOOKS: "WeakKeyDictionary[PeftModel, dict[str, _SideCar]]" = WeakKeyDictionary()


def put_sidecar(model: PeftModel, tensors: Tensors, name: str) -> None:
    """Gives the adapter `name` this side-car from now on; empty: none. Values are copied to the model's device, float32.

    tensors: `<module>.lora_A.weight` [R, d_in] and `<module>.lora_B.weight` [d_out, R], R free in each module, scale 1.
    Raises UserError where they belong to modules that have no LoRA layer.
    """
    if not tensors and model not in _HOOKS:
        return
    hooks = _hooks(model, name)
    pairs = {key.removesuffix(".lora_A.weight"): key for key in tensors if key.endswith(".lora_A.weight")}
    odd = sorted(set(pairs) - set(hooks))
    if odd:
        raise UserError(
            f"the side-car does not fit this model: {odd[0]!r} has no LoRA layer (other target modules, or another base)"
        )
    for path, hook in hooks.items():
        hook.held.pop(name, None)
        if path in pairs:
            a, b = tensors[pairs[path]], tensors[pairs[path].replace(".lora_A.", ".lora_B.")]
            hook.held[name] = (a.float().to(model.device), b.float().to(model.device))


def use_sidecar(model: PeftModel, name: str) -> None:
    """Lets the side-car of the adapter `name` act, or none where it has none."""
    for hook in _HOOKS.get(model, {}).values():
        hook.active = name


def _hooks(model: PeftModel, name: str) -> dict[str, _SideCar]:
    if model not in _HOOKS:
        _HOOKS[model] = {path: _hooked(layer, name) for path, layer in _lora_layers(model)}
    return _HOOKS[model]


def _hooked(layer: Any, name: str) -> _SideCar:
    hook = _SideCar(active=name)
    layer.register_forward_hook(hook)
    return hook


def _lora_layers(model: PeftModel) -> Iterable[tuple[str, Any]]:
    return ((path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer))
