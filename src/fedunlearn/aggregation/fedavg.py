"""FedAvg (McMahan et al. 2017, arXiv:1602.05629): the weighted mean itself."""

from dataclasses import dataclass

from fedunlearn.aggregation.base import ServerOptimizer, ServerState, cast_like, check_mean
from fedunlearn.records.adapter import Tensors


@dataclass(frozen=True, kw_only=True)
class FedAvg(ServerOptimizer):
    """x = mean. LoRA's A and B are averaged apart: mean(B) @ mean(A) is not mean(B @ A)."""

    def step(self, state: ServerState, mean: Tensors) -> ServerState:
        """See ServerOptimizer.step."""
        check_mean(state, mean)
        return ServerState(adapter=cast_like(mean, state.adapter), round=state.round + 1)
