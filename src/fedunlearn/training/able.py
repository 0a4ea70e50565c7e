"""What of trainer.args this model and this machine can do: told before the first step."""

import importlib.util

from fedunlearn.config.trainer import TrainArgs
from fedunlearn.errors import UserError
from fedunlearn.models.inner import inner_model
from fedunlearn.models.resident import Resident
from fedunlearn.training.optimizer import PACKAGES


def check_able(made: Resident, args: TrainArgs) -> None:
    """Raises UserError, all faults at once: gradient checkpointing on a model without it, an optimiser or torch.compile without CUDA or its package."""
    faults = [fault for holds, fault in _rules(made, args) if not holds]
    if faults:
        raise UserError(*faults)


def _rules(made: Resident, args: TrainArgs) -> list[tuple[bool, str]]:
    at, base, device, package = "trainer.args.", inner_model(made.model), made.device.type, PACKAGES.get(args.optim)
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
            not args.torch_compile or device == "cuda",
            f"{at}torch_compile=true: the base is on the {device}, where compiled blocks train no faster (MEASURED): "
            "set it to false, or train on CUDA",
        ),
    ]
