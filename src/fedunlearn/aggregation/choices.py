"""From the names in the configuration to the objects that reduce a round."""

from collections.abc import Callable, Mapping

from fedunlearn.aggregation.gauges.base import Gauge
from fedunlearn.aggregation.gauges.procrustes import Procrustes
from fedunlearn.aggregation.gauges.reset import Reset
from fedunlearn.aggregation.gauges.svd import Balanced, Orthonormal
from fedunlearn.aggregation.names import GaugeName, Mask, ReducerName
from fedunlearn.aggregation.reducers.base import Reducer
from fedunlearn.aggregation.reducers.best_rank import BestRank
from fedunlearn.aggregation.reducers.factor_mean import FactorMean, PaddedFactorMean
from fedunlearn.aggregation.reducers.stack import Stack
from fedunlearn.aggregation.reducers.trimmed_mean import TrimmedMean
from fedunlearn.records.rounds import Trained

_REDUCERS: Mapping[ReducerName, Callable[[float | None], Reducer]] = {
    "factors": lambda trim: FactorMean(),
    "padded_factors": lambda trim: PaddedFactorMean(),
    "trimmed_mean": lambda trim: TrimmedMean(0.0 if trim is None else trim),
    "product": lambda trim: BestRank(),
    "stack": lambda trim: Stack(),
}
_GAUGES: Mapping[GaugeName, Callable[[float | None], Gauge]] = {
    "as_is": lambda softness: Gauge(),
    "balanced": lambda softness: Balanced(),
    "orthonormal": lambda softness: Orthonormal(),
    "procrustes": lambda softness: Procrustes(1.0 if softness is None else softness),
    "reset": lambda softness: Reset(),
}


def reducer_of(name: ReducerName, trim: float | None) -> Reducer:
    """Gives the reducer of that name; trim: of trimmed_mean."""
    return _REDUCERS[name](trim)


def gauge_of(name: GaugeName, softness: float | None) -> Gauge:
    """Gives the gauge of that name; softness: of procrustes."""
    return _GAUGES[name](softness)


def trained_in(mask: Mask, round: int) -> Trained:
    """Which factors clients train in round `round` (from 1): alternately B first, for A has no gradient while B is zero."""
    if mask == "both":
        return Trained.BOTH
    return Trained.B if mask == "b" or round % 2 == 1 else Trained.A
