"""FedAvg (McMahan et al. 2017, arXiv:1602.05629): the weighted mean itself."""

from dataclasses import dataclass

from fedunlearn.aggregation.base import ServerOptimizer, ServerState, step_to_mean
from fedunlearn.records.adapter import Tensors


@dataclass(frozen=True, kw_only=True)
class FedAvg(ServerOptimizer):
    """x = mean. LoRA's A and B are averaged apart: mean(B) @ mean(A) is not mean(B @ A)."""

    @property
    def moment_names(self) -> tuple[str, ...]:
        """None: gives the mean itself."""
        return ()

    @property
    def sends_mean(self) -> bool:
        """Yes."""
        return True

    def step(self, state: ServerState, mean: Tensors) -> ServerState:
        """See ServerOptimizer.step."""
        return step_to_mean(self, state, mean)
