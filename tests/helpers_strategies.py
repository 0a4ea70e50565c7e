"""Flower strategies from outside the package, named by `_target_`: with state of each kind, and faulty ones."""

import random
import threading

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

HERE = __name__


class Velocity(FedAvg):
    """Heavy-ball momentum in float64, its state in every kind that a checkpoint keeps."""

    def __init__(self, decay: float, rates: list | None = None, **kwargs):
        super().__init__(**kwargs)
        self.decay, self.rates = decay, rates or [1.0]
        self.before = None
        self.velocity = {}

    def configure_train(self, server_round, arrays, config, grid):
        self.before = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        mean, metrics = super().aggregate_train(server_round, replies)
        old = {name: self.velocity[name] for name in self.velocity} or dict.fromkeys(mean, 0.0)
        delta = {name: mean[name].numpy().astype(np.float64) - self.before[name].numpy() for name in mean}
        self.velocity = {name: self.decay * old[name] + delta[name] for name in sorted(mean, reverse=True)}
        self.norms = [*getattr(self, "norms", []), np.array([np.linalg.norm(v) for v in self.velocity.values()])]
        self.rounds = np.array(len(self.norms))
        scale = self.rates[0] / (1 + self.norms[0].sum() * int(self.rounds))
        return ArrayRecord({k: Array(self.before[k].numpy() + scale * v) for k, v in self.velocity.items()}), metrics


class Counting(FedAvg):
    """Keeps numbers where no checkpoint finds them: in an int, in an object, in a list; a schedule and a generator stay as they are."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = 0
        self.meter = Meter()
        self.names = []
        self.schedule = lambda server_round: 1 / server_round
        self.idle_generator = np.random.default_rng(3)
        self.fine = {"a": (1, 2.5, "text"), "b": float("nan")}
        self.table = (np.zeros(2), np.ones(2))

    def aggregate_train(self, server_round, replies):
        self.calls += 1
        self.meter.total += self.schedule(server_round)
        self.names.append("round")
        self.used_generator = np.random.default_rng(3)
        return super().aggregate_train(server_round, replies)


class Meter:
    def __init__(self):
        self.total = 0.0


class Locked(FedAvg):
    """Holds something that cannot be copied, so nobody can tell whether it changed."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lock = threading.Lock()


class Faulty(FedAvg):
    """Gives what it should not; `how` says what."""

    def __init__(self, how: str, **kwargs):
        super().__init__(**kwargs)
        self.how = how

    def configure_train(self, server_round, arrays, config, grid):
        nodes = list(grid.get_node_ids())
        content = RecordDict({"arrays": arrays, "config": config})
        kind = {"evaluates": "evaluate", "queries": "train.twice"}.get(self.how, "train")
        if self.how == "configures":
            config["lr"] = 0.1
        if self.how.startswith("mu"):
            config["proximal-mu"] = {"mu_negative": -1.0, "mu_text": "much", "mu_nan": float("nan")}[self.how]
        if self.how == "rewrites":
            arrays["b"] = Array(np.ones(2, np.float32))
        if self.how == "drops":
            content["arrays"] = ArrayRecord({"a": arrays["a"]})
        if self.how == "measures":
            content["metrics"] = MetricRecord({"loss": 1.0})
        if self.how == "sends":
            grid.send_and_receive([])
        if self.how == "returns_text":
            return ["now"]
        nodes = {"invents": [*nodes, 99], "repeats": [*nodes, nodes[0]], "nobody": []}.get(self.how, nodes)
        return (Message(content, node, kind) for node in nodes)

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if self.how == "raises":
            raise RuntimeError("out of ideas")
        wrong = {
            "nothing": lambda: None,
            "dict": lambda: dict(arrays),
            "nan": lambda: arrays | {"b": Array(np.array([0, np.nan], np.float32))},
            "shape": lambda: arrays | {"b": Array(np.zeros((1, 2), np.float32))},
            "text_array": lambda: arrays | {"b": Array(np.array(["x", "y"]))},
            "unreadable": lambda: arrays | {"b": Array("float32", (2,), "safetensors", b"...")},
            "lacks": lambda: {"a": arrays["a"]},
            "extra": lambda: arrays | {"c": arrays["a"]},
        }.get(self.how, lambda: arrays)
        arrays = dict(arrays)
        made = wrong()
        return (ArrayRecord(made) if made is not None and self.how != "dict" else made), metrics


class Patient(FedAvg):
    """Waits for five nodes, and its constructor lets nobody change that."""

    def __init__(self):
        super().__init__(min_train_nodes=5)


class Greedy(FedAvg):
    """Sets itself what is ours to set."""

    def __init__(self, **kwargs):
        super().__init__(fraction_train=0.5, **kwargs)


class Demanding(FedAvg):
    """Asks for what we fix, without defaults."""

    def __init__(self, min_train_nodes: int, weighted_by_key: str):
        super().__init__(min_train_nodes=min_train_nodes, weighted_by_key=weighted_by_key)


class Drawing(FedAvg):
    """Draws a number when it is built and two clients each round, and adds noise."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drawn = random.random()

    def configure_train(self, server_round, arrays, config, grid):
        chosen = random.sample(list(grid.get_node_ids()), 2)
        return [Message(RecordDict({"arrays": arrays, "config": config}), node, "train") for node in chosen]

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({k: Array(v.numpy() + np.random.normal(size=v.shape)) for k, v in arrays.items()}), metrics


class Recording(FedAvg):
    """Keeps what it was shown, for the tests to look at."""

    seen: dict = {}

    def configure_train(self, server_round, arrays, config: ConfigRecord, grid):
        Recording.seen = {"offered": arrays, "nodes": list(grid.get_node_ids()), "config": dict(config)}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        Recording.seen |= {"round": server_round, "replies": list(replies)}
        return super().aggregate_train(server_round, replies)


class NoStrategy:
    """Has the methods, and is not Flower's."""

    def configure_train(self): ...

    def aggregate_train(self): ...


class Legacy:
    """Flower's interface of old."""

    def configure_fit(self): ...

    def aggregate_fit(self): ...


class Unfinished(Strategy):
    """Lacks most of what the interface asks for."""

    def configure_train(self, *_): ...

    def aggregate_train(self, *_): ...


class Refusing(FedAvg):
    """Its constructor judges its values."""

    def __init__(self, share: float = 0.5):
        if share > 1:
            raise ValueError("share is at most 1")
        super().__init__()


class Annotated(FedAvg):
    """Parameters of each annotation."""

    def __init__(
        self,
        count: int = 1,
        share: "float" = 0.5,
        flag: bool = False,
        word: str = "w",
        maybe: int | None = None,
        free=None,
        **kwargs,
    ):
        super().__init__(**kwargs)


class Leaving(FedAvg):
    """Wants the first two clients of every cohort, and no others."""

    def configure_train(self, server_round, arrays, config, grid):
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, node, "train") for node in list(grid.get_node_ids())[:2]]


class Huge(FedAvg):
    """Gives float64 that no float32 can hold."""

    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({k: Array(v.numpy().astype(np.float64) + 1e39) for k, v in arrays.items()}), metrics
