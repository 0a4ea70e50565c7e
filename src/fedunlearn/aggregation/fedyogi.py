"""FedYogi (Reddi et al. 2021, arXiv:2003.00295v5, Algorithm 2): FedAdam whose v moves by at most (1 - beta_2) D^2 a round."""

from dataclasses import dataclass

import torch

from fedunlearn.aggregation.base import (
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    ServerOptimizer,
    ServerState,
    check_hyperparameters,
)
from fedunlearn.aggregation.moments import step_with_moments, v_start
from fedunlearn.records.adapter import Tensors


@dataclass(frozen=True, kw_only=True)
class FedYogi(ServerOptimizer):
    """m = beta_1 m + (1 - beta_1) D; v = v - (1 - beta_2) D^2 sign(v - D^2); x += server_lr m / (sqrt(v) + tau).

    The old v stands on the right, sign(0) = 0, and x moves by the new m and v; D^2 is the square of the mean update, not of m;
    m starts at 0. v stays 0 or above: it falls by (1 - beta_2) D^2 only where it exceeds D^2. server_lr above 0: the paper
    tunes it for each task, 1e-3 is OpenFedLLM's. beta_1, beta_2 in [0, 1) and tau (adaptivity) above 0: 0.9, 0.99 and 1e-3 as
    in the paper. v_init: where v starts, 0 or above; None is tau^2, as in the paper; 0 gives the numbers of Flower 1.41's
    FedYogi.
    """

    server_lr: float = 1e-3
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    v_init: float | None = None

    def __post_init__(self) -> None:
        check_hyperparameters(
            self,
            {
                "server_lr": POSITIVE,
                "beta_1": BELOW_ONE,
                "beta_2": BELOW_ONE,
                "tau": POSITIVE,
                "v_init": NOT_NEGATIVE,
            },
        )

    @property
    def moment_names(self) -> tuple[str, ...]:
        """The running mean of D, and v."""
        return ("m", "v")

    def step(self, state: ServerState, mean: Tensors) -> ServerState:
        """See ServerOptimizer.step."""
        starts = {"m": 0.0, "v": v_start(self.v_init, self.tau)}
        return step_with_moments(self, state, mean, starts, self._tensor_step)

    def _tensor_step(self, delta: torch.Tensor, old: Tensors) -> tuple[torch.Tensor, Tensors]:
        m = self.beta_1 * old["m"] + (1 - self.beta_1) * delta
        square = delta**2
        v = old["v"] - (1 - self.beta_2) * square * torch.sign(old["v"] - square)
        return self.server_lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}
