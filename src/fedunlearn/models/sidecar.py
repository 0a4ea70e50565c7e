"""The side-car: frozen factors of their own rank beside each LoRA layer, added to its output; base and trainable factors stay as they are."""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from peft import PeftModel

from fedunlearn.aggregation.factors import modules_of
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import lora_layers
from fedunlearn.records.adapter import A, B, Tensors


@dataclass(eq=False)
class _SideCar:
    """The hook of one LoRA layer. held: adapter name -> (A [R, d_in], B [d_out, R]); active: whose is added."""

    active: str
    held: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __call__(self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        if self.active not in self.held or layer.merged or layer.disable_adapters:
            return output
        a, b = self.held[self.active]
        return output + F.linear(F.linear(inputs[0].to(a.dtype), a), b).to(output.dtype)


_HOOKS: "WeakKeyDictionary[PeftModel, dict[str, _SideCar]]" = WeakKeyDictionary()


def put_sidecar(model: PeftModel, tensors: Tensors, name: str) -> None:
    """Gives the adapter `name` this side-car from now on; empty: none. Values are copied to the model's device, float32.

    tensors: `<module>.lora_A.weight` [R, d_in] and `<module>.lora_B.weight` [d_out, R], R free in each module, scale 1.
    Raises UserError where they belong to modules that have no LoRA layer or another size, ValueError for half a pair.
    """
    if not tensors and model not in _HOOKS:
        return
    layers = dict(lora_layers(model))
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in modules_of(tensors):
        path, a, b = module.a.removesuffix(".lora_A.weight"), tensors[module.a], tensors[module.b]
        _check_fit(layers.get(path), path, a, b)
        pairs[path] = (a.float().to(model.device), b.float().to(model.device))
    for path, hook in _hooks(model).items():
        hook.held.pop(name, None)
        if path in pairs:
            hook.held[name] = pairs[path]


def _check_fit(layer: Any, path: str, a: torch.Tensor, b: torch.Tensor) -> None:
    fault = "the side-car does not fit this model"
    if layer is None:
        raise UserError(f"{fault}: {path!r} has no LoRA layer (other target modules, or another base)")
    d_in, d_out = layer.in_features, layer.out_features
    if (a.shape, b.shape) != ((len(a), d_in), (d_out, len(a))):
        raise UserError(
            f"{fault}: {path!r} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}, this model wants (R, {d_in}) and ({d_out}, R)"
        )


def held_sidecar(model: PeftModel, name: str | None = None) -> Tensors:
    """Gives the side-car that the adapter `name` has (None: the one that acts), as put_sidecar takes it; empty where there is none. Shares storage with it."""
    hooks = ((path, hook, name or hook.active) for path, hook in _HOOKS.get(model, {}).items())
    pairs = ((path, hook.held[whose]) for path, hook, whose in hooks if whose in hook.held)
    return {f"{path}{end}": tensor for path, pair in pairs for end, tensor in zip((A, B), pair, strict=True)}


def use_sidecar(model: PeftModel, name: str) -> None:
    """Lets the side-car of the adapter `name` act, or none where it has none."""
    for hook in _HOOKS.get(model, {}).values():
        hook.active = name


def _hooks(model: PeftModel) -> dict[str, _SideCar]:
    hooks = _HOOKS.setdefault(model, {})
    for path, layer in lora_layers(model):
        if path not in hooks:  # an adapter that came later may have layers of its own
            hooks[path] = _hooked(layer)
    return hooks


def _hooked(layer: Any) -> _SideCar:
    hook = _SideCar(active=next(iter(layer.active_adapters), ""))
    layer.register_forward_hook(hook)
    return hook


def sidecar_delta(model: PeftModel, path: str, like: torch.Tensor) -> torch.Tensor:
    """Gives what the acting side-car adds to the weight of one LoRA layer, B A float32, laid out as that weight is (Conv1D's [d_in, d_out]); zeros where there is none. like: that weight."""
    factors = acting_factors(model, path)
    if factors is None:
        return torch.zeros_like(like, dtype=torch.float32)
    a, b = factors
    layer: Any = model.get_submodule(path)
    return (b @ a).T if layer.fan_in_fan_out else b @ a


def acting_factors(model: PeftModel, path: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Gives A [R, d_in] and B [d_out, R] of the side-car that acts beside one LoRA layer, float32; None where there is none."""
    hook = _HOOKS.get(model, {}).get(path)
    return None if hook is None else hook.held.get(hook.active)
