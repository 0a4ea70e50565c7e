"""A client's processes as one of them sees the others: rows are dealt out, gradients summed."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from fedunlearn.training.crew import Alone, Dealt
from fedunlearn.training.steps import MicroBatch


class Together(Alone):
    """One process of `world` that train one model. Every method must be right under smaller micro-batches, and by its law is (methods.base.Method)."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self._rank, self._world, self._device = rank, world, device

    def deal(self, part: MicroBatch) -> Dealt:
        """Every `world`-th row from the rank on; where that is none, the first row without weight, for a forward gathers the base from all processes."""
        places, of_rows = self._share(len(part.rows))
        kept, of_retain = self._share(len(part.retain))
        mine = MicroBatch(
            rows=tuple(part.rows[place] for place in places),
            retain=tuple(part.retain[place] for place in kept),
            alternates=tuple(part.alternates[place] for place in places) if part.alternates else (),
        )
        return Dealt(mine, of_rows, of_retain)

    def _share(self, count: int) -> tuple[range, int]:
        mine = range(self._rank, count, self._world)
        return (mine, 1) if len(mine) or not count else (range(1), 0)

    def add_up(self, model: nn.Module, numbers: Sequence[float]) -> Sequence[float]:
        """One message for all gradients, one for the numbers (float64)."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.float().flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, whole in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(whole.view_as(gradient))
        return self.total(numbers)

    def total(self, numbers: Sequence[float]) -> Sequence[float]:
        """Sums numbers over the processes."""
        sums = torch.tensor(list(numbers), dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        return [float(value) for value in sums]
