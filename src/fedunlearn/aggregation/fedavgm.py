"""FedAvgM (Hsu et al. 2019, arXiv:1909.06335): the server's momentum over the mean updates."""

from dataclasses import dataclass

import torch

from fedunlearn.aggregation.base import BELOW_ONE, POSITIVE, ServerOptimizer, ServerState, check_hyperparameters
from fedunlearn.aggregation.moments import step_with_moments
from fedunlearn.records.adapter import Tensors


@dataclass(frozen=True, kw_only=True)
class FedAvgM(ServerOptimizer):
    """v = momentum v + D; x += server_lr v. v starts at 0, so v = D in the first round; no Nesterov step.

    momentum (the paper's beta) in [0, 1), 0.9 as in the paper; server_lr above 0, 1 as there: the paper has no such factor.
    Under a constant D the step grows to server_lr D / (1 - momentum).
    """

    server_lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_hyperparameters(self, {"server_lr": POSITIVE, "momentum": BELOW_ONE})

    @property
    def moment_names(self) -> tuple[str, ...]:
        """The velocity."""
        return ("v",)

    def step(self, state: ServerState, mean: Tensors) -> ServerState:
        """See ServerOptimizer.step."""
        return step_with_moments(self, state, mean, {"v": 0.0}, self._tensor_step)

    def _tensor_step(self, delta: torch.Tensor, old: Tensors) -> tuple[torch.Tensor, Tensors]:
        v = self.momentum * old["v"] + delta
        return self.server_lr * v, {"v": v}
