"""The interface of a server optimiser: a pure step from state and mean update to state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST
from fedunlearn.records.adapter import Tensors


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """What the server keeps between rounds and saves with each: the global adapter and the optimiser's moments.

    adapter: float32 by name. moments: moment name (`v`, `m`) -> tensors with the adapter's names and shapes, float32; a tensor
    that no round has trained yet has none. round: rounds done.
    """

    adapter: Tensors
    moments: Mapping[str, Tensors] = field(default_factory=dict)
    round: int = 0


class ServerOptimizer(ABC):
    """One server optimiser; members are frozen dataclasses, defaults from the paper named in their file.

    Laws: inputs are not modified; from a state without moments, a mean equal to the global adapter changes nothing.
    """

    @property
    def client_mu(self) -> float:
        """The proximal weight mu that clients train with; 0 leaves the term out."""
        return 0.0

    @property
    @abstractmethod
    def moment_names(self) -> tuple[str, ...]:
        """The moments kept from round to round, in name order; empty where there are none."""

    @property
    def sends_mean(self) -> bool:
        """Whether the step gives the mean itself, cast once, as step_to_mean does: only then can what the mean misses go into a side-car or the next round.

        A class that says nothing does not.
        """
        return False

    @abstractmethod
    def step(self, state: ServerState, mean: Tensors) -> ServerState:
        """Gives the state after one round.

        state.adapter: the tensors active this round. A tensor without a moment starts at the moment's start; the moments of
        tensors that are not active are handed on as they are. mean: weighted mean of the clients' adapters, float64 [shape of
        the tensor], same names as state.adapter; the mean update D is mean - state.adapter. Raises ValueError naming the first
        tensor whose name or shape differs, or the moment that shows the state to be another strategy's.
        """


def step_to_mean(optimizer: ServerOptimizer, state: ServerState, mean: Tensors) -> ServerState:
    """Gives the mean itself, cast once, as the new adapter; x + (mean - x) would differ from it by rounding."""
    check_mean(state, mean)
    check_moments(optimizer, state)
    return ServerState(adapter=cast_like(mean, state.adapter), round=state.round + 1)


def check_mean(state: ServerState, mean: Tensors) -> None:
    """Raises ValueError naming the first tensor of `mean` whose name or shape differs from the global adapter's."""
    for name in sorted(set(state.adapter) | set(mean)):
        if name not in mean or name not in state.adapter:
            raise ValueError(f"mean and global adapter differ in tensor {name!r}")
        if mean[name].shape != state.adapter[name].shape:
            raise ValueError(
                f"mean of {name!r} has shape {tuple(mean[name].shape)}, the global adapter {tuple(state.adapter[name].shape)}"
            )


def check_moments(optimizer: ServerOptimizer, state: ServerState) -> None:
    """Raises ValueError naming what shows that the moments are not this optimiser's: a moment too many, one too few, a shape.

    No moments at all is the state before the first round.
    """
    wrong = sorted(set(state.moments) ^ set(optimizer.moment_names)) if state.moments else []
    if wrong:
        fault = "is not kept by" if wrong[0] in state.moments else "is missing for"
        raise ValueError(
            f"moment {wrong[0]!r} {fault} {type(optimizer).__name__}: this is the state of another strategy"
        )
    for moment, tensors in state.moments.items():
        for name in sorted(set(tensors) & set(state.adapter)):
            if tensors[name].shape != state.adapter[name].shape:
                raise ValueError(
                    f"moment {moment!r} of {name!r} has shape {tuple(tensors[name].shape)}, the global adapter "
                    f"{tuple(state.adapter[name].shape)}: this is the state of another strategy or adapter"
                )


def cast_like(mean: Tensors, adapter: Tensors) -> dict[str, torch.Tensor]:
    """Casts the float64 mean once to the global adapter's dtypes."""
    return {name: mean[name].to(tensor.dtype) for name, tensor in adapter.items()}


class Rule(NamedTuple):
    """What a hyperparameter may be: in words, and as a test that nan fails."""

    words: str
    holds: Callable[[float], bool]


POSITIVE = Rule("a number above 0, at most 1e6", lambda value: 0 < value <= LARGEST)
NOT_NEGATIVE = Rule("a number from 0 to 1e6", lambda value: 0 <= value <= LARGEST)
BELOW_ONE = Rule("a number in [0, 1)", lambda value: 0 <= value < 1)


def check_hyperparameters(optimizer: ServerOptimizer, rules: Mapping[str, Rule]) -> None:
    """Raises UserError with every field of `optimizer` that breaks its rule; a field that is None breaks none."""
    faults = [
        f"strategy.{name}={getattr(optimizer, name)} is refused: {type(optimizer).__name__} wants {rule.words}; "
        f"correct it, or leave it out for {_default(optimizer, name)}"
        for name, rule in rules.items()
        if getattr(optimizer, name) is not None and not rule.holds(getattr(optimizer, name))
    ]
    if faults:
        raise UserError(*faults)


def _default(optimizer: ServerOptimizer, name: str) -> str:
    default = getattr(type(optimizer), name)  # a dataclass keeps its defaults as class attributes
    return "null" if default is None else str(default)
