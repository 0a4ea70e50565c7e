"""Which choices of the server go together: what makes no sense is refused before training, with the reason."""

from dataclasses import dataclass

from fedunlearn.aggregation.choices import gauge_of, reducer_of
from fedunlearn.aggregation.names import GaugeName, Mask, ReducerName, Residual


@dataclass(frozen=True, kw_only=True)
class Combination:
    """The choices of one run. strategy: its class name; moments: whether it keeps some; sends_mean: whether its step gives the mean itself;
    foreign: whether it is Flower's, of which neither of the two is asked.

    robust: its class name; reweighs: whether it does anything. ranks_differ: clients have ranks or scales of their own.
    """

    weights: str
    mask: Mask
    reducer: ReducerName
    residual: Residual
    gauge: GaugeName
    strategy: str
    moments: bool
    sends_mean: bool
    foreign: bool
    robust: str
    reweighs: bool
    ranks_differ: bool


def combination_faults(chosen: Combination) -> list[str]:
    """Gives a sentence for every pair that makes no sense; empty where all fit."""
    rules = (*_masks(chosen), *_reducers(chosen), *_server(chosen), *_ranks(chosen))
    return [fault for holds, fault in rules if not holds]


def _masks(c: Combination) -> list[tuple[bool, str]]:
    at = f"aggregation.mask={c.mask}"
    masked = c.mask != "both"
    return [
        (
            not masked or c.reducer in ("factors", "trimmed_mean"),
            f"{at} beside aggregation.reducer={c.reducer}: with one factor the same for all, the mean of the other is exact; choose reducer=factors or mask=both",
        ),
        (
            not masked or c.residual == "dropped",
            f"{at} beside aggregation.residual={c.residual}: the mean of one factor is exact, nothing is left over; choose residual=dropped or mask=both",
        ),
        (
            not masked or c.gauge not in ("procrustes", "reset"),
            f"{at} beside aggregation.gauge={c.gauge}: that gauge changes both factors of each client, of which only one comes back; choose as_is, balanced or orthonormal",
        ),
        (
            c.reducer != "trimmed_mean" or masked,
            "aggregation.reducer=trimmed_mean beside mask=both: entries of two factors mean nothing apart; choose mask=b or mask=alternate",
        ),
        (
            c.reducer != "trimmed_mean" or (c.weights == "uniform" and not c.reweighs),
            f"aggregation.reducer=trimmed_mean beside aggregation.weights={c.weights} and robust={c.robust}: it counts every client once; choose weights=uniform and robust=off",
        ),
    ]


def _reducers(c: Combination) -> list[tuple[bool, str]]:
    return [
        (
            (c.reducer == "stack") == (c.gauge == "reset"),
            f"aggregation.reducer={c.reducer} beside aggregation.gauge={c.gauge}: a stack leaves the factors empty and they begin anew, and nothing else does; "
            "choose both (aggregation=flora) or neither",
        ),
        (
            c.reducer != "stack" or c.residual == "sidecar",
            f"aggregation.reducer=stack beside aggregation.residual={c.residual}: all that was learnt would be thrown away; choose residual=sidecar",
        ),
        (
            c.reducer != "product" or c.gauge in ("balanced", "orthonormal"),
            f"aggregation.reducer=product beside aggregation.gauge={c.gauge}: its factors come out of an SVD; choose gauge=balanced or gauge=orthonormal",
        ),
        (
            c.gauge != "procrustes" or c.reducer == "factors",
            f"aggregation.gauge=procrustes beside aggregation.reducer={c.reducer}: turning factors changes their mean alone; choose reducer=factors",
        ),
        (
            c.residual != "feedback" or c.reducer == "product",
            f"aggregation.residual=feedback beside aggregation.reducer={c.reducer}: only an exact product can take up what an earlier round left; choose reducer=product or residual=sidecar",
        ),
    ]


def _server(c: Combination) -> list[tuple[bool, str]]:
    moving = not gauge_of(c.gauge, softness=None).keeps_place
    at = f"strategy {c.strategy}"
    return [
        (
            not (c.moments and moving),
            f"{at} beside aggregation.gauge={c.gauge}: its moments belong to entries of the factors, and this gauge changes what an entry means in each round; "
            "choose fedavg or fedprox, or aggregation=fedit",
        ),
        (
            c.sends_mean or c.foreign or c.residual == "dropped",
            f"{at} beside aggregation.residual={c.residual}: what is left over belongs to the mean itself, which this strategy does not send; choose fedavg or fedprox, or residual=dropped "
            "(one of your own that does send it says so by its property sends_mean)",
        ),
        (
            not c.foreign or (c.reducer, c.residual, c.gauge, c.reweighs) == ("factors", "dropped", "as_is", False),
            f"{at} is Flower's and does its own averaging, per factor: it goes with aggregation.reducer=factors, residual=dropped, gauge=as_is and robust=off only",
        ),
        (
            not c.foreign or c.mask != "alternate",
            f"{at} is Flower's and wants the same tensors in every round: aggregation.mask=alternate sends others; choose mask=both or mask=b",
        ),
    ]


def _ranks(c: Combination) -> list[tuple[bool, str]]:
    at = "partition.ranks or lora_alphas give clients a rank or scale of their own"
    return [
        (
            not c.ranks_differ or reducer_of(c.reducer, trim=None).mixes_ranks,
            f"{at}, but aggregation.reducer={c.reducer} needs factors of one: choose aggregation=flora, flexlora or hetlora, or leave them null",
        ),
        (
            not (c.ranks_differ and c.foreign),
            f"{at}, but strategy {c.strategy} is Flower's and needs arrays of one shape: leave them null",
        ),
        (
            not c.ranks_differ or c.mask == "both",
            f"{at} beside aggregation.mask={c.mask}: the frozen factor could not be the same for all; choose mask=both",
        ),
    ]
