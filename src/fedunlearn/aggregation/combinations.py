"""Which choices of the server go together: what makes no sense is refused before training, with the reason."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedunlearn.aggregation.choices import gauge_of, reducer_of
from fedunlearn.aggregation.names import GaugeName, Mask, ReducerName, Residual


@dataclass(frozen=True, kw_only=True)
class Combination:
    """The choices of one run. strategy: its class name; moments: whether it keeps some; sends_mean: whether its step gives the mean itself;
    foreign: whether it is Flower's, of which neither of the two is asked.

    robust: its class name; reweighs: whether it does anything. ranks_differ: clients have ranks or scales of their own. sidecar_rank: see AggregationConfig.
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
    sidecar_rank: int | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What an adapter is beside pairs of factors, or began with. adalora: whether triplets stand in place of the pairs. bias, modules_to_save, lora_bias: whether it has such tensors. initial: `pissa`, `olora`,
    `orthogonal` or whatever else its init_lora_weights says. experts: some of its pairs are fused experts'.
    """

    dora: bool = False
    adalora: bool = False
    lora_bias: bool = False
    bias: bool = False
    modules_to_save: bool = False
    initial: str = "True"
    experts: bool = False

    @property
    def plain(self) -> str:
        """The keys that give it tensors which are no factors; empty where there are none."""
        has = {"lora_bias": self.lora_bias, "bias": self.bias, "modules_to_save": self.modules_to_save}
        return ", ".join(key for key, holds in has.items() if holds)


def variant_of(config: Mapping[str, object]) -> Variant:
    """Reads it from PEFT's keys, of a yaml or of an adapter; what is left out or null is PEFT's default."""
    return Variant(
        dora=bool(config.get("use_dora")),
        adalora=config.get("peft_type") == "ADALORA",
        lora_bias=bool(config.get("lora_bias")),
        bias=config.get("bias") not in (None, "none"),
        modules_to_save=bool(config.get("modules_to_save")),
        initial=str(config.get("init_lora_weights")),
        experts=bool(config.get("target_parameters")),
    )


@dataclass(frozen=True, kw_only=True)
class OwnSteps:
    """A server-side method. name: its class; changes: whether it makes steps of its own out of products; fresh: whether it begins with fresh factors above the old adapter."""

    name: str
    changes: bool
    fresh: bool


def variant_faults(c: Combination, variant: Variant, method: OwnSteps | None) -> list[str]:
    """Gives a sentence for everything beside which this variant would be wrong; empty where all is right. method: None for a local one."""
    rules = (
        *_dora(c, variant, method),
        *_adalora(c, variant, method),
        *_plain(c, variant, method),
        *_initial(c, variant),
        *_experts(c, variant, method),
    )
    return [fault for holds, fault in rules if not holds]


def _dora(c: Combination, variant: Variant, method: OwnSteps | None) -> list[tuple[bool, str]]:
    if not variant.dora:
        return []
    at, why = (
        "use_dora=true",
        "a weight is there its magnitude times a direction, W0 + s B A over its norm, and no sum of products is one",
    )
    return [
        *_no_products(c, method, at, why, "choose aggregation=fedit or aggregation=ffa, or use_dora=false"),
        (
            c.mask != "alternate",
            f"{at} beside aggregation.mask=alternate: alternating makes the mean of products exact, and {why}; choose aggregation=fedit or aggregation=ffa, or use_dora=false",
        ),
        (
            not c.ranks_differ,
            f"{at} beside partition.ranks or lora_alphas: magnitudes belong to the norm of one rank and scale; leave them null",
        ),
        (
            not variant.lora_bias,
            f"{at} beside lora_bias=true: PEFT has no layer of both; set lora_bias=false, or use_dora=false",
        ),
    ]  # fmt: skip


def _adalora(c: Combination, variant: Variant, method: OwnSteps | None) -> list[tuple[bool, str]]:
    if not variant.adalora:
        return []
    at, why = (
        "peft_type=ADALORA",
        "an update is there B diag(E) A, and what is averaged, and importance is of, are A, E and B apart",
    )
    return [
        *_no_products(c, method, at, why, "choose aggregation=fedit, or peft_type=LORA"),
        (
            c.mask == "both",
            f"{at} beside aggregation.mask={c.mask}: a factor that rests has no update, and importance needs one of each; choose aggregation=fedit, or peft_type=LORA",
        ),
        (
            not c.foreign,
            f"{at} beside strategy {c.strategy}: Flower's does its own averaging, and the server's mask comes after a step of ours; choose strategy=fedavg, fedprox, fedadam or another of "
            "configs/strategy, or peft_type=LORA",
        ),
        (
            not c.ranks_differ,
            f"{at} beside partition.ranks or lora_alphas: the server gives out the ranks, one mask for all; leave them null",
        ),
    ]  # fmt: skip


def _no_products(c: Combination, method: OwnSteps | None, at: str, why: str, way: str) -> list[tuple[bool, str]]:
    """What reads or makes products s B A, beside a variant whose update is none. why: that it is none; way: out."""
    return [
        (c.reducer == "factors", f"{at} beside aggregation.reducer={c.reducer}: {why}; {way}"),
        (
            c.residual == "dropped",
            f"{at} beside aggregation.residual={c.residual}: what is left over is a product, and {why}; {way}",
        ),
        (c.gauge == "as_is", f"{at} beside aggregation.gauge={c.gauge}: it turns or refactors pairs, and {why}; {way}"),
        (
            c.weights != "product_norm",
            f"{at} beside aggregation.weights=product_norm: the norm of s B A says nothing of it, for {why}; choose weights=owned or uniform",
        ),
        (not c.reweighs, f"{at} beside robust {c.robust}: it compares products, and {why}; choose robust=off"),
        (
            method is None,
            f"{at} beside method {method and method.name}, a server-side one, which works on products: {why}; choose a local method, or leave {at} out",
        ),
    ]


def _plain(c: Combination, variant: Variant, method: OwnSteps | None) -> list[tuple[bool, str]]:
    name = method.name if method else ""
    return [
        (
            not variant.plain or method is None or not (method.changes or method.fresh),
            f"{variant.plain} beside method {name}: its steps add and take away products of factors, and biases and whole modules are none, so what they learnt of the "
            "forget rows would stay; choose a local method, rollback or pgd, or an adapter without them",
        ),
        (
            not (variant.lora_bias and c.ranks_differ),
            "lora_bias=true beside partition.ranks or lora_alphas: a bias acts times each client's own scale, so that its mean is not the mean of what it does; leave them null",
        ),
    ]  # fmt: skip


def _initial(c: Combination, variant: Variant) -> list[tuple[bool, str]]:
    of_base = variant.initial.startswith(("pissa", "olora"))
    at = f"init_lora_weights={variant.initial}"
    return [
        (
            not ((of_base or variant.initial == "orthogonal") and c.ranks_differ),
            f"{at} beside partition.ranks or lora_alphas: the factors begin with a product that is made up for at rank r, and a client of another rank or scale would begin away "
            "from the base; leave them null, or choose init_lora_weights=true or gaussian",
        ),
        (
            variant.initial in ("None", "True") or not variant.lora_bias,
            f"{at} beside lora_bias=true: PEFT knows LoRA's own biases with init_lora_weights=true alone; set that, or lora_bias=false",
        ),
        (
            not of_base or c.sidecar_rank is None,
            f"{at} beside aggregation.sidecar_rank={c.sidecar_rank}: the side-car holds what the factors took of the base's weights, and a cut of it would change the base; leave it null",
        ),
        (
            not (of_base and variant.experts),
            f"{at} beside target_parameters: a side-car cannot stand beside fused experts; choose init_lora_weights=true, or leave the experts out",
        ),
    ]  # fmt: skip


def _experts(c: Combination, variant: Variant, method: OwnSteps | None) -> list[tuple[bool, str]]:
    name = method.name if method else ""
    return [
        (
            not variant.experts or c.residual != "sidecar",
            "target_parameters beside aggregation.residual=sidecar: a side-car cannot stand beside fused experts; choose aggregation=fedit, ffa or flexlora, or leave the experts out",
        ),
        (
            not variant.experts or method is None or not (method.changes or method.fresh),
            f"target_parameters beside method {name}: its steps go into a side-car, which cannot stand beside fused experts; choose a local method, rollback or pgd, or leave the experts out",
        ),
    ]  # fmt: skip


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
