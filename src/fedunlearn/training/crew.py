"""Who carries out a client's steps: one process, or one of several that share every micro-batch."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from fedunlearn.config.trainer import TrainArgs
from fedunlearn.training.steps import MicroBatch


@dataclass(frozen=True)
class Dealt:
    """What this process makes of a micro-batch. of_rows, of_retain: 0 where the rows only stand in for an empty share and count for nothing, else 1."""

    part: MicroBatch
    of_rows: int = 1
    of_retain: int = 1


class Crew(Protocol):
    """The processes together, as one of them sees it.

    Laws: over all of them the rows dealt with weight 1 are the micro-batch's, each once; what the optimiser steps over is the sum of all gradients, and every one of them
    has the same adapter and the same numbers afterwards.
    """

    def begin(self, model: nn.Module, optimizer: Optimizer, args: TrainArgs) -> None:
        """Makes ready for the steps of one task. The adapter's tensors may lie elsewhere afterwards."""

    def deal(self, part: MicroBatch) -> Dealt:
        """Gives this process's share, with at least one row wherever the micro-batch has some: all run the same forwards."""

    def backward(self, loss: torch.Tensor) -> None:
        """Adds this loss's gradients to those of the step."""

    def add_up(self, model: nn.Module, numbers: Sequence[float]) -> Sequence[float]:
        """Once all losses of a step are down: sums the gradients, in place, and gives the sums of the numbers, over the processes."""

    def step(self, optimizer: Optimizer, args: TrainArgs) -> None:
        """Clips the gradients, makes the optimiser's step and forgets them."""


class Alone:
    """One process: everything is its own."""

    def begin(self, model: nn.Module, optimizer: Optimizer, args: TrainArgs) -> None:
        """See Crew."""

    def deal(self, part: MicroBatch) -> Dealt:
        """See Crew."""
        return Dealt(part)

    def backward(self, loss: torch.Tensor) -> None:
        """See Crew."""
        _accelerator(loss.device.type).backward(loss)

    def add_up(self, model: nn.Module, numbers: Sequence[float]) -> Sequence[float]:
        """See Crew."""
        return numbers

    def step(self, optimizer: Optimizer, args: TrainArgs) -> None:
        """See Crew."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if args.max_grad_norm > 0:
            _accelerator(parameters[0].device.type).clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@functools.cache
def _accelerator(device: str) -> Accelerator:
    return Accelerator(cpu=device == "cpu")


ALONE = Alone()
