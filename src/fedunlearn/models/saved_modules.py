"""Modules that are trained whole (modules_to_save): float32 copies beside the base's own, whatever dtype the base has."""

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.utils.hooks import RemovableHandle

from fedunlearn.errors import UserError
from fedunlearn.models.layers import ends_in

_HOOKS: "WeakKeyDictionary[nn.Module, tuple[RemovableHandle, ...]]" = WeakKeyDictionary()
AT = "model.model_args.lora_config.modules_to_save"


def saved_modules(model: nn.Module) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """Every module that is trained whole, by its path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper))


def check_saved(model: PeftModel, names: object) -> None:
    """Raises UserError for a name that matches no module, and on a 16-bit base for a module that holds others."""
    paths = dict(saved_modules(model))
    missing = [
        name
        for name in (names if isinstance(names, list | tuple | set) else ())
        if not any(ends_in(path, name) for path in paths)
    ]
    faults = [
        f"{AT}: {name!r} matches no module of this base: write names as print(model) tells them, such as lm_head or model.norm"
        for name in sorted(missing)
    ]
    if model.dtype != torch.float32:
        faults += [
            f"{AT}: {path.removeprefix('base_model.model.')!r} holds other modules, and those of a {model.dtype} base cannot be trained in float32 beside it: "
            "name single layers, or set torch_dtype=float32"
            for path, module in paths.items()
            if list(module.original_module.children())
        ]
    if faults:
        raise UserError(*faults)


def widen_saved(model: PeftModel, name: str) -> None:
    """Makes the copies of one adapter float32; what goes in and out is cast where the base is not (once a module). Others on this base may have copies where it has none."""
    for _, module in saved_modules(model):
        if name not in module.modules_to_save:
            continue
        copy = module.modules_to_save[name]
        if all(parameter.dtype == torch.float32 for parameter in copy.parameters()):
            continue
        narrow = next(copy.parameters()).dtype
        copy.float()
        _HOOKS[copy] = (
            copy.register_forward_pre_hook(_widened),
            copy.register_forward_hook(lambda _, inputs, output, dtype=narrow: output.to(dtype)),
        )


def narrow_saved(model: PeftModel) -> None:
    """Takes the casts away again, before a copy takes the place of the base's own module for good."""
    for _, module in saved_modules(model):
        for copy in module.modules_to_save.values():
            for hook in _HOOKS.pop(copy, ()):
                hook.remove()


def _widened(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def stored_values(model: PeftModel) -> Mapping[str, torch.Tensor]:
    """Gives the base's own values of the saved modules, under the names that the adapter has for them."""
    return {
        f"{path}.{key}": tensor
        for path, module in saved_modules(model)
        for key, tensor in module.original_module.state_dict().items()
    }
