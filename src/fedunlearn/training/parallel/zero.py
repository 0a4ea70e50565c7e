"""DeepSpeed's ZeRO through accelerate: gradients and optimiser in shards (stage 2), the base too (stage 3)."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import nn
from torch.optim import Optimizer

from fedunlearn.config.trainer import TrainArgs
from fedunlearn.training.parallel.together import Together

Stage = Literal[2, 3]


def zero_config(stage: Stage, args: TrainArgs, world: int, largest: int) -> dict[str, object]:
    """Gives DeepSpeed's configuration. largest: entries of the adapter's largest tensor; so large a tensor stays whole on each process under stage 3.

    Steps end where the loop says (no accumulation of DeepSpeed's own), gradients are clipped as max_grad_norm says; the optimiser and its schedule come from us.
    """
    shards: dict[str, object] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if stage == 3:
        shards["stage3_param_persistence_threshold"] = largest
    return {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": 1,
        "train_batch_size": args.per_device_train_batch_size * world,
        "managed_gradient_accumulation": False,
        "gradient_clipping": args.max_grad_norm,
        "zero_optimization": shards,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
    }


class Zero(Together):
    """This process among those of a ZeRO engine: the loop's backward and step are the engine's."""

    def __init__(self, rank: int, world: int, device: torch.device, stage: Stage) -> None:
        super().__init__(rank, world, device)
        self._stage: Stage = stage
        self._engine: Any = None

    def begin(self, model: nn.Module, optimizer: Optimizer, args: TrainArgs) -> None:
        """A fresh engine for a fresh optimiser; the last task's is let go."""
        self.end()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        config = zero_config(self._stage, args, self._world, max(whole_size(p) for p in parameters))
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        self._engine, _ = accelerator.prepare(model, optimizer)

    def backward(self, loss: torch.Tensor) -> None:
        """The engine takes the mean over processes; ours is the sum."""
        self._engine.backward(loss * self._world)

    def add_up(self, model: nn.Module, numbers: Sequence[float]) -> Sequence[float]:
        """The engine adds gradients up in its step."""
        return self.total(numbers)

    def step(self, optimizer: Optimizer, args: TrainArgs) -> None:
        """Clipping, step and zeroing are the engine's."""
        self._engine.step()

    def end(self) -> None:
        """Lets the engine go."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None


def whole_size(parameter: nn.Parameter) -> int:
    """Entries of a parameter, whether it lies in shards or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
