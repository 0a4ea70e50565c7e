"""A fresh optimiser and schedule for one client in one round."""

from collections.abc import Iterable

import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from fedunlearn.config.trainer import TrainArgs


def build_optimizer(parameters: Iterable[torch.nn.Parameter], args: TrainArgs, lr_scale: float) -> Optimizer:
    """Gives the optimiser that args.optim names, at learning_rate * lr_scale; it knows nothing of earlier rounds or clients."""
    rate = args.learning_rate * lr_scale
    if args.optim == "sgd":
        return SGD(parameters, lr=rate, weight_decay=args.weight_decay)
    return AdamW(
        parameters,
        lr=rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        fused=args.optim == "adamw_torch_fused",
    )


def build_schedule(optimizer: Optimizer, args: TrainArgs, num_steps: int, warmup: int) -> LRScheduler:
    """Gives transformers' schedule of that name over the round's own steps."""
    schedule: LRScheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps
    )
    return schedule
