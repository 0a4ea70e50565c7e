"""DeepSpeed's ZeRO-2 through accelerate: the base whole on each device, gradients and the optimiser's state in shards."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from packaging.version import Version
from torch import nn
from torch.optim import Optimizer

from fedunlearn.config.trainer import TrainArgs
from fedunlearn.errors import UserError
from fedunlearn.training.parallel.together import Together

OLDEST = "0.19.0"
"""The release from which on a step ends where the caller says (managed_gradient_accumulation)."""


def check_deepspeed() -> None:
    """Raises UserError where DeepSpeed is missing or too old."""
    way_out = f"pip install 'deepspeed>={OLDEST}', or choose trainer.parallel=fsdp"
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"trainer.parallel=deepspeed needs DeepSpeed, and it is not installed: {way_out}")
    found = importlib.metadata.version("deepspeed")
    if Version(found) < Version(OLDEST):
        raise UserError(f"trainer.parallel=deepspeed: DeepSpeed {found} is older than {OLDEST}: {way_out}")


def zero_config(args: TrainArgs, world: int) -> dict[str, object]:
    """Gives DeepSpeed's configuration.

    Steps end where the loop says, none of DeepSpeed's own accumulation; gradients are clipped as max_grad_norm says (0: not at all); optimiser and schedule come from us.
    """
    return {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": args.per_device_train_batch_size * world,
        "managed_gradient_accumulation": False,
        "gradient_clipping": args.max_grad_norm,
        "zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }


def tell_numbers(environment: dict[str, str], rank: int, world: int) -> None:
    """Sets what accelerate and DeepSpeed read their place from."""
    numbers: Mapping[str, int] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    environment.update({name: str(number) for name, number in numbers.items()})
    environment["ACCELERATE_USE_DEEPSPEED"] = "true"


class Zero(Together):
    """One of the processes of a ZeRO engine: the loop's backward and step are the engine's."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        super().__init__(rank, world, device)
        tell_numbers(os.environ, rank, world)  # type: ignore[arg-type]
        self._accelerator: Accelerator | None = None
        self._engine: Any = None

    def begin(self, model: nn.Module, optimizer: Optimizer, args: TrainArgs) -> None:
        """A fresh engine for a fresh optimiser; the last task's is let go."""
        self._engine = None
        if self._accelerator is None:  # a second one with a plugin is refused: a run has one TrainArgs
            plugin = DeepSpeedPlugin(hf_ds_config=zero_config(args, self._world))
            self._accelerator = Accelerator(deepspeed_plugin=plugin)
        else:
            self._accelerator.free_memory()  # ends the engine and forgets it and its optimiser, which accelerate lists
        self._engine, _ = self._accelerator.prepare(model, optimizer)
        if not hasattr(self._engine, "managed_gradient_accumulation"):
            raise ValueError(f"accelerate made a {type(self._engine).__name__} and no DeepSpeed engine")

    def backward(self, loss: torch.Tensor) -> None:
        """The engine takes the mean over processes; ours is the sum."""
        self._engine.backward(loss * self._world)

    def add_up(self, model: nn.Module, numbers: Sequence[float]) -> Sequence[float]:
        """The engine adds gradients up in its step."""
        return self.total(numbers)

    def step(self, optimizer: Optimizer, args: TrainArgs) -> None:
        """Clipping, step and zeroing are the engine's."""
        self._engine.step()
