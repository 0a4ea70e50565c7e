"""Methods from outside the package, named by `_target_`: some hostile, for the launchers' tests."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedunlearn.methods.base import Method, RetainTerm
from fedunlearn.methods.tokens import Need, StepTotals, TokenLosses


@dataclass(frozen=True, kw_only=True)
class RetainOnly(Method):
    """The control: the same rows, draws and steps as a real method, and a forget loss that is always zero."""

    gamma: float = field(default=1.0, init=False)
    alpha: float = 1.0
    retain: RetainTerm = "nll"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.NLL})

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        return 0.0 * batch.nll.sum()


@dataclass(frozen=True, kw_only=True)
class Dying(RetainOnly):
    """Kills its process in the first forward, as running out of memory does."""

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        os._exit(9)


@dataclass(frozen=True, kw_only=True)
class Hanging(RetainOnly):
    """Never comes back."""

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        time.sleep(10_000)
        return super().forget(batch, totals)


@dataclass(frozen=True, kw_only=True)
class Scripted(RetainOnly):
    """Takes one word off the file `plan` a forward pass: `die` kills its process, `hang` does not come back, all others do nothing."""

    plan: str

    def forget(self, batch: TokenLosses, totals: StepTotals) -> torch.Tensor:
        plan = Path(self.plan)
        word, *left = plan.read_text().split() or ["end"]
        plan.write_text(" ".join(left))
        if word == "die":
            os._exit(9)
        if word == "hang":
            time.sleep(10_000)
        return super().forget(batch, totals)
