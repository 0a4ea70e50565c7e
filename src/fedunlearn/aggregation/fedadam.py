"""FedAdam (Reddi et al. 2021, arXiv:2003.00295v5, Algorithm 2): Adam on the mean updates, without bias correction."""

import math
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
class FedAdam(ServerOptimizer):
    """m = beta_1 m + (1 - beta_1) D; v = beta_2 v + (1 - beta_2) D^2; x += server_lr m / (sqrt(v) + tau), with the new m and v.

    D^2 is the square of the mean update, not of m; m starts at 0. server_lr above 0: the paper tunes it for each task, 1e-3 is
    OpenFedLLM's. beta_1, beta_2 in [0, 1) and tau (adaptivity) above 0: 0.9, 0.99 and 1e-3 as in the paper. v_init: where v
    starts, 0 or above; None is tau^2, as in the paper. bias_correction multiplies server_lr by
    sqrt(1 - beta_2^(t+1)) / (1 - beta_1^(t+1)), t the server's round from 1, for every tensor alike, however often it was
    trained; with v_init 0 these are the numbers of Flower 1.41's FedAdam (Kingma and Ba, arXiv:1412.6980, have t for t + 1).
    """

    server_lr: float = 1e-3
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    v_init: float | None = None
    bias_correction: bool = False

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
        """The running means of D and of D^2."""
        return ("m", "v")

    def step(self, state: ServerState, mean: Tensors) -> ServerState:
        """See ServerOptimizer.step."""
        server_lr = self.server_lr * self._correction(state.round + 1)

        def tensor_step(delta: torch.Tensor, old: Tensors) -> tuple[torch.Tensor, Tensors]:
            m = self.beta_1 * old["m"] + (1 - self.beta_1) * delta
            v = self.beta_2 * old["v"] + (1 - self.beta_2) * delta**2
            return server_lr * m / (v.sqrt() + self.tau), {"m": m, "v": v}

        starts = {"m": 0.0, "v": v_start(self.v_init, self.tau)}
        return step_with_moments(self, state, mean, starts, tensor_step)

    def _correction(self, round: int) -> float:
        if not self.bias_correction:
            return 1.0
        return math.sqrt(1 - self.beta_2 ** (round + 1)) / (1 - self.beta_1 ** (round + 1))
