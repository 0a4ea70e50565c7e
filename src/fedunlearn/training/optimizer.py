"""A fresh optimiser and schedule for one client in one round."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, cast

from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from fedunlearn.config.trainer import Optim, TrainArgs
from fedunlearn.records.adapter import B

PACKAGES: Mapping[Optim, str] = MappingProxyType(
    {
        "adamw_bnb_8bit": "bitsandbytes",
        "adamw_8bit": "bitsandbytes",
        "paged_adamw_8bit": "bitsandbytes",
        "paged_adamw_32bit": "bitsandbytes",
        "adamw_torch_8bit": "torchao",
    }
)
"""Optimisers that another package brings, and that want CUDA; training.able refuses them elsewhere."""
_CLASSES: Mapping[Optim, str] = MappingProxyType(
    {
        "adamw_bnb_8bit": "AdamW8bit",
        "adamw_8bit": "AdamW8bit",
        "paged_adamw_8bit": "PagedAdamW8bit",
        "paged_adamw_32bit": "PagedAdamW32bit",
        "adamw_torch_8bit": "AdamW8bit",
    }
)


def build_optimizer(parameters: Mapping[str, Parameter], args: TrainArgs, lr_scale: float) -> Optimizer:
    """Gives the optimiser that args.optim names, at learning_rate * lr_scale; it knows nothing of earlier rounds or clients.

    parameters: by the names of live_parameters. With a loraplus_lr_ratio other than 1 the B factors are a group of their own at ratio times that rate; weight decay,
    which AdamW multiplies by the rate, grows with it. Raises ImportError where its package is missing.
    """
    rate = args.learning_rate * lr_scale
    groups = _groups(parameters, args.loraplus_lr_ratio or 1.0, rate)
    if args.optim == "sgd":
        return SGD(groups, lr=rate, weight_decay=args.weight_decay)
    usual: dict[str, Any] = {
        "lr": rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
    }
    if args.optim in PACKAGES:
        theirs = importlib.import_module(f"{PACKAGES[args.optim]}.optim")
        return cast("Optimizer", getattr(theirs, _CLASSES[args.optim])(groups, **usual))
    return AdamW(groups, fused=args.optim == "adamw_torch_fused", **usual)


def _groups(parameters: Mapping[str, Parameter], ratio: float, rate: float) -> list[dict[str, Any]]:
    """One group where there is one rate: then the arithmetic is that of plain LoRA bit by bit."""
    if ratio == 1:
        return [{"params": list(parameters.values())}]
    of_b = [parameter for name, parameter in parameters.items() if name.endswith(B)]
    others = [parameter for name, parameter in parameters.items() if not name.endswith(B)]
    groups = [{"params": others, "lr": rate}, {"params": of_b, "lr": ratio * rate}]
    return [group for group in groups if group["params"]]


def build_schedule(optimizer: Optimizer, args: TrainArgs, num_steps: int, warmup: int) -> LRScheduler:
    """Gives transformers' schedule of that name over the round's own steps."""
    schedule: LRScheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps
    )
    return schedule
