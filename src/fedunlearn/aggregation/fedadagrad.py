"""FedAdagrad (Reddi et al. 2021, arXiv:2003.00295v5, Algorithm 2): steps shrink with the sum of squared mean updates."""

from dataclasses import dataclass

import torch

from fedunlearn.aggregation.base import (
    NOT_NEGATIVE,
    POSITIVE,
    ServerOptimizer,
    ServerState,
    check_hyperparameters,
    check_moments,
)
from fedunlearn.aggregation.moments import step_with_moments, v_start
from fedunlearn.records.adapter import Tensors


@dataclass(frozen=True, kw_only=True)
class FedAdagrad(ServerOptimizer):
    """v = v + D^2, entry by entry; x += server_lr D / (sqrt(v) + tau), with the new v.

    beta_1 = 0, as in the paper's experiments, so that m is D and nothing of it is kept. server_lr above 0: the paper tunes it
    for each task, 1e-3 is OpenFedLLM's. tau (adaptivity) above 0, 1e-3 as in the paper. v_init: where v starts, 0 or above;
    None is tau^2, as in the paper; 0 gives the numbers of Flower 1.41's FedAdagrad.
    """

    server_lr: float = 1e-3
    tau: float = 1e-3
    v_init: float | None = None

    def __post_init__(self) -> None:
        check_hyperparameters(self, {"server_lr": POSITIVE, "tau": POSITIVE, "v_init": NOT_NEGATIVE})

    @property
    def moment_names(self) -> tuple[str, ...]:
        """The sum of squares."""
        return ("v",)

    def step(self, state: ServerState, mean: Tensors) -> ServerState:
        """See ServerOptimizer.step."""
        check_moments(self, state)
        _refuse_velocity(state)
        return step_with_moments(self, state, mean, {"v": v_start(self.v_init, self.tau)}, self._tensor_step)

    def _tensor_step(self, delta: torch.Tensor, old: Tensors) -> tuple[torch.Tensor, Tensors]:
        v = old["v"] + delta**2
        return self.server_lr * delta / (v.sqrt() + self.tau), {"v": v}


def _refuse_velocity(state: ServerState) -> None:
    """Raises ValueError at FedAvgM's v, which bears the same name and has a sign: its square root would be nan."""
    for name, v in sorted(state.moments.get("v", {}).items()):
        if (v < 0).any():
            raise ValueError(
                f"moment 'v' of {name!r} is negative, no sum of squares: this is the state of another strategy"
            )
