"""FedProx (Li et al. 2020, arXiv:1812.06127): FedAvg on the server, a proximal term on the clients."""

from dataclasses import dataclass

from fedunlearn.aggregation.base import ServerOptimizer, ServerState, cast_like, check_mean
from fedunlearn.errors import UserError
from fedunlearn.records.adapter import Tensors


@dataclass(frozen=True, kw_only=True)
class FedProx(ServerOptimizer):
    """Each client adds (mu/2) ||w - x||^2 over its trainable tensors, x a detached snapshot of the global adapter.

    mu = 0 leaves the term out: FedAvg bit by bit.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise UserError(f"strategy.mu={self.mu} of FedProx must not be negative (0 is FedAvg)")

    @property
    def client_mu(self) -> float:
        """The proximal weight that clients train with."""
        return self.mu

    def step(self, state: ServerState, mean: Tensors) -> ServerState:
        """See ServerOptimizer.step."""
        check_mean(state, mean)
        return ServerState(adapter=cast_like(mean, state.adapter), round=state.round + 1)
