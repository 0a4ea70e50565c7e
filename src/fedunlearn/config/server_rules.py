"""What a run's choices for the server have to do with each other: server-side methods beside strategies, trimming beside the cohort."""

import math
from collections.abc import Sequence

from fedunlearn.aggregation.base import ServerOptimizer
from fedunlearn.aggregation.fedavg import FedAvg
from fedunlearn.aggregation.fedprox import FedProx
from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.aggregation.robust.base import Robust
from fedunlearn.aggregation.robust.off import Off
from fedunlearn.config.server import AggregationConfig
from fedunlearn.protocols.base import Protocol
from fedunlearn.protocols.by_method import ByMethod
from fedunlearn.server_methods.base import ServerMethod

Strategy = ServerOptimizer | FlowerStrategy


def server_method_rules(
    server: ServerMethod, protocol: Protocol, strategy: Strategy, requests: int, ranks_differ: bool
) -> list[tuple[bool, str]]:
    """Gives what a server-side method asks of a run, each with the sentence for where it does not hold. requests: how many there are."""
    name = type(server).__name__
    return [
        (
            isinstance(protocol, ByMethod),
            f"protocol {type(protocol).__name__} beside method {name}, a server-side method that says itself who works: leave protocol out (by_method)",
        ),
        (
            not isinstance(strategy, FlowerStrategy),
            f"method {name} beside a strategy of Flower's: the server's steps are not that strategy's; choose one of ours",
        ),
        (
            requests <= 1 or server.beginning != "others",
            f"several requests beside method {name}, which begins at fine-tuning's last round and would bring back what the first ones took: give one, or choose another method",
        ),
        (
            not ranks_differ,
            f"method {name} beside partition.ranks or lora_alphas: server-side methods want one rank; leave them null",
        ),
    ]


def own_step_rules(
    server: ServerMethod, own: Sequence[bool], chosen: AggregationConfig, strategy: Strategy, robust: Robust
) -> list[tuple[bool, str]]:
    """Gives what would have no effect beside a method that makes every step itself. own: round by round, whether the step is the method's."""
    name = type(server).__name__
    at = f"beside method {name}, which makes every step itself, as the best rank r of an exact sum, has no effect"
    averages = not server.never_averages
    return [
        (
            any(own) == (type(server).change is not ServerMethod.change),
            f"method {name}: change is asked for in rounds whose step says ServerStep.OWN, and there is one without the other: override both, or neither",
        ),
        (
            averages or isinstance(strategy, FedAvg | FedProx),
            f"strategy {type(strategy).__name__} {at}: choose strategy=fedavg, or fedprox for its term at the clients",
        ),
        (
            averages or isinstance(robust, Off),
            f"robust {type(robust).__name__} {at}: choose robust=off",
        ),
        (
            averages
            or (
                chosen.reducer in ("factors", "product")
                and chosen.residual == "dropped"
                and chosen.gauge != "procrustes"
            ),
            f"aggregation.reducer={chosen.reducer} with residual={chosen.residual} and gauge={chosen.gauge} {at}: choose aggregation=flexlora",
        ),
    ]


def trim_rules(chosen: AggregationConfig, count: int) -> list[tuple[bool, str]]:
    """Gives what a trimmed mean asks of the `count` clients that a round draws."""
    if chosen.trim is None or chosen.reducer != "trimmed_mean":
        return []
    dropped = chosen.trim * count + 1e-9
    at = f"aggregation.trim={chosen.trim} of the {count} clients that trainer.federated draws"
    least = math.ceil(100 / max(count, 1)) / 100
    raised = f", or raise it to {least} at least" if least < 0.5 else ""
    return [
        (
            dropped >= 1 or count < 1,
            f"{at} leaves out nobody: draw more{raised}",
        ),
        (2 * math.floor(dropped) < count or dropped < 1, f"{at} leaves nobody: draw more, or lower it"),
    ]
