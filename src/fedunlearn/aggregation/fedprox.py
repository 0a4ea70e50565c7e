"""FedProx (Li et al. 2020, arXiv:1812.06127): FedAvg on the server, a proximal term on the clients."""

from dataclasses import dataclass

from fedunlearn.aggregation.base import (
    NOT_NEGATIVE,
    ServerOptimizer,
    ServerState,
    check_hyperparameters,
    step_to_mean,
)
from fedunlearn.records.adapter import Tensors


@dataclass(frozen=True, kw_only=True)
class FedProx(ServerOptimizer):
    """Each client adds (mu/2) ||w - x||^2 over its trainable tensors, x a detached snapshot of the global adapter.

    mu >= 0; 0 leaves the term out: FedAvg bit by bit.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        check_hyperparameters(self, {"mu": NOT_NEGATIVE})

    @property
    def client_mu(self) -> float:
        """The proximal weight that clients train with."""
        return self.mu

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
