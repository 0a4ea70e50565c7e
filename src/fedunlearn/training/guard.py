"""The guard against divergence: past a bound a client ends its epoch."""

import functools
import math
from dataclasses import dataclass

from fedunlearn.config.trainer import GuardArgs
from fedunlearn.records.adapter import Tensors


@dataclass(frozen=True, eq=False)
class Guard:
    """Watches one client's steps. start: the adapter as the round began, both factors, on the model's device."""

    args: GuardArgs
    start: Tensors

    @functools.cached_property
    def _size(self) -> float:
        return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in self.start.values()))

    def judge_loss(self, loss: float) -> str:
        """Says why this step's loss, before the step is made, ends the epoch; empty where it does not."""
        bound = self.args.max_loss
        if bound is None or abs(loss) <= bound:
            return ""
        return f"loss {loss:.4g} beyond trainer.guard.max_loss={bound:g}"

    def judge_update(self, now: Tensors) -> str:
        """Says why what was trained so far ends the epoch: ||w - start|| over ||start||, whatever is trained of both factors; not judged where start is 0."""
        bound = self.args.max_update_ratio
        if bound is None:
            return ""
        way = math.sqrt(sum(float((t - self.start[name]).double().square().sum()) for name, t in now.items()))
        size = self._size
        if way <= bound * size or not size:
            return ""
        return f"an update of norm {way:.4g}, {way / size:.3g} times the adapter's own, beyond trainer.guard.max_update_ratio={bound:g}"
