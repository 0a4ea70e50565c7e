"""From the updates that count to what the server sends next: module after module, memory for one module of every client."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from fedunlearn.aggregation.factors import Factors, Module, modules_of, plain_of, read_factors
from fedunlearn.aggregation.gauges.base import Gauge, Moment
from fedunlearn.aggregation.pieces import in_pieces
from fedunlearn.aggregation.product import (
    LowRank,
    compressed,
    inner_products,
    product_of,
    squared_norm,
    update_of,
    weighted_sum,
)
from fedunlearn.aggregation.reducers.base import ModuleCohort, Reducer
from fedunlearn.aggregation.robust.base import Robust, Weighting, checked_weighting
from fedunlearn.errors import UserError
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import Trained
from fedunlearn.records.shape import ClientShape
from fedunlearn.seeds import seed_of

# What casting a factor to float32 may lose of it: a difference below this share of its terms is rounding, not a residual.
ROUNDING = 2.0**-24

ReadTensor = Callable[[int, str], torch.Tensor]
ReadBlocks = Callable[[Module], LowRank | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Choices:
    """How to reduce. sidecar: whether what the factors miss goes into a frozen block; feedback: into the next round's product.

    sidecar_rank: r' to which the whole side-car is recompressed each round; None = it grows, exact.
    """

    reducer: Reducer
    gauge: Gauge
    robust: Robust
    sidecar: bool = False
    feedback: bool = False
    sidecar_rank: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Cohort:
    """What came back in one round.

    adapter: the global adapter the round began with; scales: its s by module name. shapes: client -> rank and scale of its own (empty:
    all have the adapter's). weights: client -> p_k, sum 1. trained: the factors that clients trained; the other one is the adapter's.
    read: (client, tensor name) -> tensor, asked module by module. carried: error feedback of the round before, by tensor name, scale 1.
    blocks: what the side-car holds of a module, asked for where it is recompressed; block_rank: its rank by module name.
    """

    adapter: Tensors
    scales: Mapping[str, float]
    weights: Mapping[int, float]
    read: ReadTensor
    round: int
    seed: int
    trained: Trained = Trained.BOTH
    shapes: Mapping[int, ClientShape] = field(default_factory=dict)
    carried: Tensors = field(default_factory=dict)
    blocks: ReadBlocks = lambda module: None
    block_rank: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Reduced:
    """mean: float64, the tensors that change (both factors where the gauge moved, else those trained). weights: client -> what it counted for,
    after a robust re-weighting. block: float32 factors of scale 1 for the side-car, empty where there is none; replaces: it stands for the whole
    side-car. carried: float32, for the next round.

    error: ||exact product - what is sent|| / ||exact product||, both pooled over modules; norm: ||exact product||.
    """

    mean: Tensors
    weights: Mapping[int, float]
    block: Tensors = field(default_factory=dict)
    replaces: bool = False
    carried: Tensors = field(default_factory=dict)
    error: float = 0.0
    norm: float = 0.0


ModuleWeights = Mapping[str, Mapping[int, float]]
"""By module name: client -> what it counts for there; the old adapter counts for what is left to 1."""


def reduce_round(choices: Choices, cohort: Cohort, weights: ModuleWeights | None = None) -> Reduced:
    """Gives the mean, the weights that were used, what goes beside the factors, and what was lost on the way.

    weights: where each module has weights of its own; robust weights do not act then.
    """
    weighting = (
        _weighting(choices.robust, cohort)
        if weights is None
        else Weighting(tuple(cohort.weights[k] for k in sorted(cohort.weights)))
    )
    moment = Moment(
        round=cohort.round, generator=torch.Generator().manual_seed(seed_of("lora reset", cohort.seed, cohort.round))
    )
    tally = _Tally(replaces=choices.sidecar and _replaces(choices, cohort))
    for module in modules_of(cohort.adapter):
        own = weighting if weights is None else _own_weighting(cohort, weights[module.name])
        _reduce_module(choices, cohort, module, own, moment, tally)
    tally.mean |= _plain_means(choices.reducer, cohort, weighting)
    names = tally.mean if not choices.gauge.keeps_place else _trained_names(tally.mean, cohort)
    exact = tally.exact**0.5
    return Reduced(
        mean={name: tally.mean[name] for name in sorted(names)},
        weights=dict(zip(sorted(cohort.weights), weighting.clients, strict=True)),
        block=tally.block,
        replaces=tally.replaces,
        carried=tally.carried,
        error=tally.lost**0.5 / exact if exact > 0 else 0.0,
        norm=exact,
    )


@dataclass(eq=False)
class _Tally:
    replaces: bool
    mean: dict[str, torch.Tensor] = field(default_factory=dict)
    block: dict[str, torch.Tensor] = field(default_factory=dict)
    carried: dict[str, torch.Tensor] = field(default_factory=dict)
    exact: float = 0.0
    lost: float = 0.0


def _reduce_module(
    choices: Choices, cohort: Cohort, module: Module, weighting: Weighting, moment: Moment, tally: _Tally
) -> None:
    members = _members(cohort, module, weighting)
    exact = members.exact()
    b, a = choices.reducer.reduce(choices.gauge.align(members, moment))
    b, a = choices.gauge.refactor(b, a, members.old, moment)
    tally.mean |= {module.b: b, module.a: a}
    kept = _as_stored(cohort.adapter, module, b, a)
    sent = product_of(Factors(kept[0].double(), kept[1].double(), members.old.scale))
    if choices.sidecar:
        sent = _into_sidecar(choices, cohort, module, exact, sent, tally)
    products = inner_products([exact, sent])
    tally.exact += max(float(products[0, 0]), 0.0)
    tally.lost += _squared_distance(products)
    if choices.feedback:
        left = _difference(exact, sent)
        tally.carried |= {module.b: left.left.float(), module.a: left.right.float()}


def _plain_means(reducer: Reducer, cohort: Cohort, weighting: Weighting) -> Iterator[tuple[str, torch.Tensor]]:
    """Gives the mean of every plain tensor, entry by entry, float64, the old one's share included."""
    for name in plain_of(cohort.adapter):
        tensors = (cohort.read(client, name) for client in sorted(cohort.weights))  # one by one: a saved head is large
        yield name, reducer.reduce_plain(tensors, weighting.clients, cohort.adapter[name], weighting.old)


def _into_sidecar(
    choices: Choices, cohort: Cohort, module: Module, exact: LowRank, sent: LowRank, tally: _Tally
) -> LowRank:
    """Puts what the factors miss into this round's block; gives what is sent altogether, less what the side-car held before."""
    # a stack stays as it came: an SVD gains nothing where the factors hold nothing of it
    untouched = not bool(sent.left.any()) and bool(exact.left.any())
    left_over = exact if untouched else _difference(exact, sent)
    held = cohort.blocks(module) if tally.replaces else None
    whole = left_over if held is None else weighted_sum([1.0, 1.0], [held, left_over])
    if tally.replaces:
        whole = compressed(whole, choices.sidecar_rank)
    tally.block |= {module.b: whole.left.float(), module.a: whole.right.float()}
    stored = LowRank(tally.block[module.b].double(), tally.block[module.a].double())
    now = weighted_sum([1.0, 1.0], [sent, stored])
    return now if held is None else weighted_sum([1.0, -1.0], [now, held])


def _difference(exact: LowRank, sent: LowRank) -> LowRank:
    """Exact - sent without what is mere rounding of the factors sent: 2 r more ranks of it, or all of them where nothing is missing."""
    return compressed(weighted_sum([1.0, -1.0], [exact, sent]), floor=ROUNDING * squared_norm(exact) ** 0.5)


def _replaces(choices: Choices, cohort: Cohort) -> bool:
    """Whether this round's block takes the whole side-car's place: a rank was set, or some module's stack would pass its smaller side."""
    if choices.sidecar_rank is not None:
        return True
    return any(_passes(choices.reducer, cohort, module) for module in modules_of(cohort.adapter))


def _passes(reducer: Reducer, cohort: Cohort, module: Module) -> bool:
    a, b = cohort.adapter[module.a], cohort.adapter[module.b]
    ranks = [cohort.shapes[k].rank if cohort.shapes else int(a.shape[0]) for k in cohort.weights]
    new = reducer.residual_rank(ranks, int(a.shape[0]))
    return cohort.block_rank.get(module.name, 0) + new > min(a.shape[1], b.shape[0])


def _weighting(robust: Robust, cohort: Cohort) -> Weighting:
    clients = sorted(cohort.weights)
    weights = tuple(cohort.weights[client] for client in clients)
    if not robust.reads_gram:
        return Weighting(weights)
    gram = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for module in modules_of(cohort.adapter):
        old = _old(cohort, module)
        gram += inner_products([update_of(client, old) for client in _clients(cohort, module)])
    for name in plain_of(cohort.adapter):
        for old_one, *theirs in in_pieces([cohort.adapter[name], *(cohort.read(client, name) for client in clients)]):
            moves = torch.stack([one.double() - old_one.double() for one in theirs])
            gram += moves @ moves.T
    try:
        return checked_weighting(robust.reweigh(weights, gram), len(clients))
    except Exception as error:  # a robust weight may be the user's own
        raise UserError(
            f"robust {type(robust).__name__}, round {cohort.round}: {error if isinstance(error, ValueError) else repr(error)}; "
            "correct it, or choose another (robust=off)"
        ) from error


def _members(cohort: Cohort, module: Module, weighting: Weighting) -> ModuleCohort:
    return ModuleCohort(
        old=_old(cohort, module),
        clients=tuple(client.double for client in _clients(cohort, module)),
        weights=weighting.clients,
        old_weight=weighting.old,
        carried=_carried(cohort, module),
    )


def _own_weighting(cohort: Cohort, weights: Mapping[int, float]) -> Weighting:
    shares = tuple(weights[client] for client in sorted(cohort.weights))
    return Weighting(shares, old=1.0 - sum(shares))


def _old(cohort: Cohort, module: Module) -> Factors:
    return read_factors(cohort.adapter, module, cohort.scales[module.name]).double


def _clients(cohort: Cohort, module: Module) -> list[Factors]:
    return [_client(cohort, module, client) for client in sorted(cohort.weights)]


def _client(cohort: Cohort, module: Module, client: int) -> Factors:
    scale = cohort.shapes[client].scale if cohort.shapes else cohort.scales[module.name]
    b = cohort.adapter[module.b] if cohort.trained is Trained.A else cohort.read(client, module.b)
    a = cohort.adapter[module.a] if cohort.trained is Trained.B else cohort.read(client, module.a)
    return Factors(b, a, scale)


def _carried(cohort: Cohort, module: Module) -> LowRank | None:
    if module.a not in cohort.carried:
        return None
    return LowRank(cohort.carried[module.b].double(), cohort.carried[module.a].double())


def _as_stored(adapter: Tensors, module: Module, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the server will send of the mean: cast once, as a server optimiser that gives the mean itself does."""
    return b.to(adapter[module.b].dtype), a.to(adapter[module.a].dtype)


def _trained_names(names: Tensors, cohort: Cohort) -> list[str]:
    return [name for name in names if cohort.trained.covers(name)]


def aggregation_error(cohort: Cohort, adapter: Tensors) -> tuple[float, float]:
    """Gives error and norm (see Reduced) of an adapter that somebody else made of the cohort."""
    weighting = Weighting(tuple(cohort.weights[client] for client in sorted(cohort.weights)))
    exact = lost = 0.0
    for module in modules_of(cohort.adapter):
        want = _members(cohort, module, weighting).exact()
        sent = product_of(read_factors(adapter, module, cohort.scales[module.name]))
        products = inner_products([want, sent])
        exact += max(float(products[0, 0]), 0.0)
        lost += _squared_distance(products)
    return (lost / exact) ** 0.5 if exact > 0 else 0.0, exact**0.5


def _squared_distance(products: torch.Tensor) -> float:
    return max(float(products[0, 0] - 2 * products[0, 1] + products[1, 1]), 0.0)


@dataclass(frozen=True)
class UpdateNorms:
    """update: ||U_k||, what the client changed, as a product; factors: what it changed in A and B by themselves, which a mean of factors sees
    (c A and B / c are the same product); product: ||s_k B_k A_k||, what it holds; start: A and B by themselves, as it was sent them. Pooled over
    modules and plain tensors (root of the sum of squares), product over modules alone. by_module: ||U_k|| of each, by module name.
    """

    update: float
    factors: float
    product: float
    start: float
    by_module: Mapping[str, float]


def update_norms(tensors: Tensors, start: Tensors, scales: Mapping[str, float]) -> UpdateNorms:
    """Measures one client's adapter against the one it was sent, both whole and of the same ranks. scales: by module name."""
    factors = product = sent = 0.0
    by_module: dict[str, float] = {}
    for module in modules_of(start):
        new = read_factors(tensors, module, scales[module.name]).double
        old = read_factors(start, module, scales[module.name]).double
        by_module[module.name] = squared_norm(update_of(new, old)) ** 0.5
        product += squared_norm(product_of(new))
        factors += float((new.a - old.a).square().sum() + (new.b - old.b).square().sum())
        sent += float(old.a.square().sum() + old.b.square().sum())
    update = sum(norm * norm for norm in by_module.values())
    for name in plain_of(start):
        moved = float((tensors[name].double() - start[name].double()).square().sum())
        update, factors, sent = update + moved, factors + moved, sent + float(start[name].double().square().sum())
    return UpdateNorms(update**0.5, factors**0.5, product**0.5, sent**0.5, by_module)
