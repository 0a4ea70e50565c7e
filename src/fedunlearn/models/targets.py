"""What the names of target modules mean in one base."""

import re

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedunlearn.errors import UserError

LINEAR = (nn.Linear, Conv1D)


def check_targets(base: nn.Module, targets: object) -> None:
    """Raises UserError for a target that matches nothing, or something that is no linear layer."""
    if targets == "all-linear":
        return
    at = "model.model_args.lora_config.target_modules"
    leaves = {name: module for name, module in base.named_modules() if not list(module.children())}
    known = ", ".join(
        sorted({name.rsplit(".", 1)[-1] for name, module in leaves.items() if isinstance(module, LINEAR)})
    )
    faults = []
    for target in [targets] if isinstance(targets, str) else sorted(targets):  # type: ignore[call-overload]
        found = [module for name, module in leaves.items() if _matches(name, target, isinstance(targets, str))]
        if not found:
            faults.append(f"{at}: {target!r} matches no module of this base; linear ones are {known}")
        elif not all(isinstance(module, LINEAR) for module in found):
            faults.append(
                f"{at}: {target!r} matches {type(found[0]).__name__}, which is no linear layer; linear ones are {known}"
            )
    if faults:
        raise UserError(*faults)


def _matches(name: str, target: str, pattern: bool) -> bool:
    """PEFT's rule: a text is a pattern for the whole name, an entry of a list is a name or its end."""
    if not pattern:
        return name == target or name.endswith(f".{target}")
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise UserError(
            f"model.model_args.lora_config.target_modules={target!r} is no regular expression ({error})"
        ) from error
