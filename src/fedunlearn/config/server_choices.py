"""What a run chose for its server, as the rules of fedunlearn.aggregation.combinations ask for it."""

from fedunlearn.aggregation.base import ServerOptimizer
from fedunlearn.aggregation.combinations import Combination, OwnSteps
from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.aggregation.robust.base import Robust
from fedunlearn.config.server import AggregationConfig
from fedunlearn.server_methods.base import ServerMethod


def combination_of(
    chosen: AggregationConfig, strategy: ServerOptimizer | FlowerStrategy, robust: Robust, *, ranks_differ: bool
) -> Combination:
    """Gives the choices that have to go together."""
    foreign = isinstance(strategy, FlowerStrategy)
    return Combination(
        weights=chosen.weights,
        mask=chosen.mask,
        reducer=chosen.reducer,
        residual=chosen.residual,
        gauge=chosen.gauge,
        strategy=strategy.target if isinstance(strategy, FlowerStrategy) else type(strategy).__name__,
        moments=not isinstance(strategy, FlowerStrategy) and bool(strategy.moment_names),
        sends_mean=not isinstance(strategy, FlowerStrategy) and strategy.sends_mean,
        foreign=foreign,
        robust=type(robust).__name__,
        reweighs=robust.reads_gram,
        ranks_differ=ranks_differ,
        sidecar_rank=chosen.sidecar_rank,
    )


def own_steps(server: ServerMethod | None) -> OwnSteps | None:
    """Gives what a server-side method does by itself; None where the method is a local one."""
    if server is None:
        return None
    return OwnSteps(
        name=type(server).__name__,
        changes=type(server).change is not ServerMethod.change,
        fresh=server.beginning == "fresh",
    )
