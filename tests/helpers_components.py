"""Members of the interfaces from outside the package, named by `_target_`: odd ones, each in one way."""

from abc import abstractmethod
from dataclasses import dataclass, field, replace

import torch

from fedunlearn.aggregation.base import ServerOptimizer, ServerState, step_to_mean
from fedunlearn.aggregation.robust.base import Robust, Weighting
from fedunlearn.config.launcher import Launcher
from fedunlearn.partitions.base import Partitioner

HERE = __name__


@dataclass(frozen=True, kw_only=True)
class First(Robust):
    """Chooses the first client whatever it sends."""

    def reweigh(self, weights, gram):
        return Weighting(tuple(float(k == 0) for k in range(len(weights))))


@dataclass(frozen=True, kw_only=True)
class OddRobust(Robust):
    """Gives what it should not; `how` says what."""

    how: str = ""

    def reweigh(self, weights, gram):
        if self.how == "raises":
            raise RuntimeError("out of ideas")
        return {
            "": Weighting(weights),
            "tensors": Weighting(tuple(torch.tensor(weights, dtype=torch.float64))),
            "few": Weighting(weights[1:]),
            "not_a_number": Weighting((float("nan"), *weights[1:])),
            "endless": Weighting((float("inf"), *weights[1:])),
            "sum": Weighting(tuple(2 * weight for weight in weights)),
            "old": Weighting(weights, 0.5),
            "list": list(weights),
        }[self.how]


@dataclass(frozen=True, kw_only=True)
class OddStep(ServerOptimizer):
    """Gives a state that it should not; `how` says what, from round `begin` on."""

    how: str = ""
    begin: int = 2

    @property
    def moment_names(self):
        return ("m",)

    def step(self, state, mean):
        adapter = {name: mean[name].to(old.dtype) for name, old in state.adapter.items()}
        made = ServerState(
            adapter=adapter,
            moments={"m": {name: torch.zeros_like(old) for name, old in adapter.items()}},
            round=state.round + 1,
        )
        return made if made.round < self.begin else self._odd(made, min(adapter), state)

    def _odd(self, made, name, before):
        if self.how == "raises":
            raise RuntimeError("out of ideas")
        tensor, m = made.adapter[name], made.moments["m"]
        small = {key: value for key, value in made.adapter.items() if key != name}
        return {
            "": lambda: made,
            "double": lambda: replace(made, adapter={key: value.double() for key, value in made.adapter.items()}),
            "nan": lambda: replace(made, adapter={**small, name: tensor * float("nan")}),
            "overflow": lambda: replace(made, adapter={**small, name: tensor.double() + 1e39}),
            "shape": lambda: replace(made, adapter={**small, name: tensor[:1]}),
            "numpy": lambda: replace(made, adapter={**small, name: tensor.numpy()}),
            "lacks": lambda: replace(made, adapter=small),
            "extra": lambda: replace(made, adapter={**made.adapter, "more": tensor}),
            "same_round": lambda: replace(made, round=before.round),
            "skips": lambda: replace(made, round=made.round + 1),
            "moment_nan": lambda: replace(made, moments={"m": {**m, name: m[name] + float("inf")}}),
            "moment_shape": lambda: replace(made, moments={"m": {**m, name: m[name][:1]}}),
            "moment_tensor": lambda: replace(made, moments={"m": {**m, "more": m[name]}}),
            "moment_other": lambda: replace(made, moments={"n": m}),
            "moment_empty": lambda: replace(made, moments={"m": {}}),
            "moment_none": lambda: replace(made, moments={}),
            "adapter_alone": lambda: made.adapter,
        }[self.how]()


@dataclass(frozen=True, kw_only=True)
class Signs(ServerOptimizer):
    """Keeps no moments and does not send the mean."""

    server_lr: float = 1e-3

    @property
    def moment_names(self):
        return ()

    def step(self, state, mean):
        moved = {name: old + self.server_lr * (mean[name] - old).sign().float() for name, old in state.adapter.items()}
        return ServerState(adapter=moved, round=state.round + 1)


@dataclass(frozen=True, kw_only=True)
class Mean(ServerOptimizer):
    """Sends the mean, and says so."""

    @property
    def moment_names(self):
        return ()

    @property
    def sends_mean(self):
        return True

    def step(self, state, mean):
        return step_to_mean(self, state, mean)


@dataclass(frozen=True, kw_only=True)
class Half(ServerOptimizer):
    """Abstract: it says nothing of its moments."""

    def step(self, state, mean):
        return state

    @abstractmethod
    def more(self): ...


@dataclass(frozen=True, kw_only=True)
class Unread(ServerOptimizer):
    """A hint that this module does not know."""

    rate: "Unknown" = 1.0  # noqa: F821

    @property
    def moment_names(self):
        return ()

    def step(self, state, mean):
        return state


@dataclass(frozen=True, kw_only=True)
class Dies(Partitioner):
    """Its own check fails as no check should."""

    how: str = "key"

    def __post_init__(self):
        {"key": lambda: {}["x"], "zero": lambda: 1 / 0, "value": lambda: int("x")}[self.how]()

    def deal(self, num_authors, num_clients):
        return ()


@dataclass(frozen=True, kw_only=True)
class Lists(Partitioner):
    """Parameters of the kinds that a config has and one that it has not."""

    shares: list[float] = field(default_factory=list)
    pairs: tuple[int, ...] = ()
    table: frozenset[float] = field(default_factory=frozenset)

    def deal(self, num_authors, num_clients):
        return ()


@dataclass(frozen=True, kw_only=True)
class Nowhere(Launcher):
    """Nobody knows how to start it."""

    threads: int | None = None
    isolate: bool = False
    start_timeout: float = 1.0
