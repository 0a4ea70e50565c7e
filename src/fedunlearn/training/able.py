"""What of trainer.args this model and this machine can do: told before the first step."""

import importlib.util
import os
import shutil

import torch
from torch import nn

from fedunlearn.config.trainer import TrainArgs
from fedunlearn.errors import UserError
from fedunlearn.models.hidden_states import decoder_blocks
from fedunlearn.models.inner import inner_model
from fedunlearn.models.resident import Resident
from fedunlearn.training.optimizer import PACKAGES


def check_able(made: Resident, args: TrainArgs, device: torch.device | None = None) -> None:
    """Raises UserError, all faults at once: gradient checkpointing on a model without it, an optimiser without CUDA or its package, torch.compile without a compiler.

    device: what the steps are made on; None: where the model is.
    """
    faults = [fault for holds, fault in _rules(made, args, (device or made.device).type) if not holds]
    if faults:
        raise UserError(*faults)


def _rules(made: Resident, args: TrainArgs, device: str) -> list[tuple[bool, str]]:
    at, base, package = "trainer.args.", inner_model(made.model), PACKAGES.get(args.optim)
    return [
        (
            not args.gradient_checkpointing or bool(getattr(base, "supports_gradient_checkpointing", False)),
            f"{at}gradient_checkpointing=true: {type(base).__name__} has no gradient checkpointing; set it to false and lower "
            f"{at}per_device_train_batch_size instead (raise {at}gradient_accumulation_steps by as much)",
        ),
        (
            package is None or device == "cuda",
            f"{at}optim={args.optim} needs a CUDA device, and the base is on the {device}: set adamw_torch "
            "(an adapter's moments are small: two numbers a trained parameter)",
        ),
        (
            package is None or device != "cuda" or importlib.util.find_spec(package) is not None,
            f"{at}optim={args.optim} needs the package {package}, which is not installed: pip install 'fedunlearn[{package}]', or set adamw_torch",
        ),
        (
            not args.torch_compile or _has_blocks(base),
            f"{at}torch_compile=true: {type(base).__name__} has no list of decoder blocks that could be compiled: set it to false",
        ),
        (
            not args.torch_compile or _has_compiler(device),
            f"{at}torch_compile=true: on the {device} torch needs {'triton' if device == 'cuda' else 'a C++ compiler (g++, or what CXX names)'}, "
            "which is not here: install it, or set it to false",
        ),
    ]


def _has_blocks(base: nn.Module) -> bool:
    try:
        return len(decoder_blocks(base)) > 0
    except ValueError:
        return False


def _has_compiler(device: str) -> bool:
    if device == "cuda":
        return importlib.util.find_spec("triton") is not None
    return shutil.which(os.environ.get("CXX", "g++")) is not None
