"""The record of `trainer.parallel`: how many processes carry out one client's work, and how they share it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from fedunlearn.config.model import ModelConfig
from fedunlearn.errors import UserError

Kind = Literal["none", "fsdp", "deepspeed", "tp"]
MOST_PROCESSES = 1024
NO_TP_TRAINING = (
    "trainer.parallel=tp: LoRA cannot be trained over layers split by a tensor-parallel plan: with PEFT 0.21 and transformers 5.23 the first forward ends with "
    "\"RuntimeError: shape '[40, 8]' is invalid for input of size 640\", for the factors get a layout that is not their layer's. Choose trainer.parallel=fsdp; a merged "
    "model is evaluated so: src/eval.py parallel=tp"
)


@dataclass(frozen=True, kw_only=True)
class ParallelArgs:
    """kind: `fsdp`: the base in shards (torch's fully_shard), `deepspeed`: ZeRO-2, `tp`: layers split by the model's own plan, for evaluations.

    processes: how many; null: as many as there are CUDA devices, 2 without any.
    """

    kind: Kind
    processes: int | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.kind == "none" and self.processes is not None:
            faults.append(
                f"parallel.processes={self.processes} beside kind=none: leave it out, or choose fsdp or deepspeed (src/eval.py: tp)"
            )
        if self.kind != "none" and self.processes is not None and not 2 <= self.processes <= MOST_PROCESSES:
            faults.append(
                f"parallel.processes={self.processes} must lie between 2 and {MOST_PROCESSES}, or be null (one a CUDA device); one process is parallel=none"
            )
        if faults:
            raise UserError(*faults)


REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "zero_stage": "DeepSpeed's stage is 2, which has gradients and the optimiser's state in shards; at 3 DeepSpeed (0.19.8 was tried) cuts the adapter into shards beside the "
        "base: its tensors lie elsewhere after every step, and values that are written into them, as those that a task begins with, do not reach the shards. Leave it out, or "
        "choose kind=fsdp, which has the base alone in shards"
    }
)
"""Keys of the record that are not known, each with the reason and the way out."""

Parallel = Kind | ParallelArgs
"""What a config may say: the kind alone, or the record."""


def parallel_args(said: Parallel) -> ParallelArgs:
    """Gives the record of either form."""
    return said if isinstance(said, ParallelArgs) else ParallelArgs(kind=said)


def home_model(model: ModelConfig, said: Parallel) -> ModelConfig:
    """Gives the model as the process that others work for holds it: on the CPU."""
    if parallel_args(said).kind == "none":
        return model
    return replace(model, model_args=replace(model.model_args, device="cpu"))


def settled(args: ParallelArgs, device: str, num_devices: int) -> ParallelArgs:
    """Gives the record with its number of processes.

    device: `cpu` or `cuda`, what the processes work on; num_devices: CUDA devices there are. Raises UserError where there are too few of them, and for
    deepspeed without CUDA.
    """
    if args.kind == "deepspeed" and device != "cuda":
        raise UserError(
            "parallel=deepspeed needs CUDA devices, and the clients work on the CPU: choose trainer.parallel=fsdp, which runs there too, "
            "or a machine with devices and model.model_args.device=cuda"
        )
    if device != "cuda":
        return replace(args, processes=args.processes or 2)
    if num_devices < 2 or (args.processes or 2) > num_devices:
        raise UserError(
            f"parallel={args.kind} with {args.processes or 2} processes wants a CUDA device for each, and there are {num_devices}: lower parallel.processes, "
            "choose parallel=none, or model.model_args.device=cpu"
        )
    return replace(args, processes=args.processes or num_devices)
