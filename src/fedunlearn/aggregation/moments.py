"""What the server optimisers with moments share: the walk over the tensors, in float64, and where moments start."""

from collections.abc import Callable, Mapping

import torch

from fedunlearn.aggregation.base import ServerOptimizer, ServerState, check_mean, check_moments
from fedunlearn.records.adapter import Tensors

# One tensor's D and old moments -> what is added to x, and the new moments; all float64.
TensorStep = Callable[[torch.Tensor, Tensors], tuple[torch.Tensor, Tensors]]


def step_with_moments(
    optimizer: ServerOptimizer, state: ServerState, mean: Tensors, starts: Mapping[str, float], tensor_step: TensorStep
) -> ServerState:
    """Gives the state after `tensor_step` on each tensor of state.adapter.

    starts: moment name -> the value of every entry before the first step. The adapter is rounded once, to its own dtype, and
    the moments to float32: x moves by the new moments as computed, not as stored.
    """
    check_mean(state, mean)
    check_moments(optimizer, state)
    adapter: dict[str, torch.Tensor] = {}
    moments = {moment: dict(state.moments.get(moment, {})) for moment in starts}
    for name, tensor in state.adapter.items():
        x = tensor.double()
        old = {moment: _moment(moments[moment].get(name), x, start) for moment, start in starts.items()}
        change, new = tensor_step(mean[name] - x, old)
        adapter[name] = (x + change).to(tensor.dtype)
        for moment in starts:
            moments[moment][name] = new[moment].float()
    return ServerState(adapter=adapter, moments=moments, round=state.round + 1)


def _moment(saved: torch.Tensor | None, like: torch.Tensor, start: float) -> torch.Tensor:
    return torch.full_like(like, start) if saved is None else saved.double()


def v_start(v_init: float | None, tau: float) -> float:
    """Gives where v starts: at tau^2 where v_init is None, the least that the paper allows (Algorithm 2: v_-1 >= tau^2)."""
    return tau**2 if v_init is None else v_init
