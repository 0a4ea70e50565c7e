"""The interface of a server optimiser: a pure step from state and mean update to state."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fedunlearn.records.adapter import Tensors


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """What the server keeps between rounds and saves with each: the global adapter and the optimiser's moments.

    adapter: float32 by name. moments: moment name (`v`, `m`) -> tensors with the adapter's names and shapes, float32.
    round: rounds done.
    """

    adapter: Tensors
    moments: Mapping[str, Tensors] = field(default_factory=dict)
    round: int = 0


class ServerOptimizer(ABC):
    """One server optimiser; members are frozen dataclasses, defaults from the paper named in their file.

    Laws: inputs are not modified; with no moments and server_lr 1 a mean equal to the global adapter changes nothing.
    """

    @property
    def client_mu(self) -> float:
        """The proximal weight mu that clients train with; 0 leaves the term out."""
        return 0.0

    @abstractmethod
    def step(self, state: ServerState, mean: Tensors) -> ServerState:
        """Gives the state after one round.

        mean: weighted mean of the clients' adapters, float64 [shape of the tensor], same names as state.adapter; the mean
        update D is mean - state.adapter. Raises ValueError naming the first tensor whose name or shape differs.
        """


def check_mean(state: ServerState, mean: Tensors) -> None:
    """Raises ValueError naming the first tensor of `mean` whose name or shape differs from the global adapter's."""
    for name in sorted(set(state.adapter) | set(mean)):
        if name not in mean or name not in state.adapter:
            raise ValueError(f"mean and global adapter differ in tensor {name!r}")
        if mean[name].shape != state.adapter[name].shape:
            raise ValueError(
                f"mean of {name!r} has shape {tuple(mean[name].shape)}, the global adapter {tuple(state.adapter[name].shape)}"
            )


def cast_like(mean: Tensors, adapter: Tensors) -> dict[str, torch.Tensor]:
    """Casts the float64 mean once to the global adapter's dtypes."""
    return {name: mean[name].to(tensor.dtype) for name, tensor in adapter.items()}
