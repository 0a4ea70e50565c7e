"""Sums, multiples and differences of whole adapters, as their products s B A: task arithmetic (Ilharco et al. 2023, arXiv:2212.04089) on factors.

Scales (alpha / r, rsLoRA, alpha_pattern) are folded in, and experts are pairs like any other. A plain tensor is added where it adds to an
output (the bias beside a B), averaged where it stands for a value of the base (weights must then sum to 1), and refused where neither holds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedunlearn.aggregation.factors import Module, config_of_ranks, modules_of, plain_of, read_factors, scales_of
from fedunlearn.aggregation.gauges.svd import balanced
from fedunlearn.aggregation.product import (
    SMALLEST,
    LowRank,
    inner_products,
    product_of,
    squared_norm,
    truncated_svd,
    update_of,
    weighted_sum,
)
from fedunlearn.errors import UserError
from fedunlearn.records.adapter import B_BIAS, MAGNITUDE, Adapter, B, Tensors

PATTERNS = ("rank_pattern", "alpha_pattern")
WHERE = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys of a PEFT config that say which modules have factors."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Summed:
    """A sum as one adapter of scale 1. error: ||sum - adapter|| / ||sum|| over all products, 0 for the exact one but for rounding; rank: its largest."""

    adapter: Adapter
    error: float
    rank: int


@dataclass(frozen=True, kw_only=True)
class Apart:
    """How far two adapters lie apart in one module (or plain tensor): Frobenius norms of both, of their difference, and its share of the first; cosine of the two.

    relative and cosine are None where a norm they divide by is 0. product: whether it is s B A; a plain tensor is taken as it is stored, and where
    one adapter lacks it, so that the base's own value acts there, the difference is not known either (None).
    """

    name: str
    first: float
    second: float
    difference: float | None
    relative: float | None
    cosine: float | None
    product: bool = True


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """Gives the adapter whose product is `factor` times this one's; only B changes, and the bias beside it. -1 is exact.

    Raises UserError for a factor that is not finite and for tensors that have no multiple (magnitudes, saved modules, the base's biases).
    """
    _check([adapter], [factor], averages=False)
    ends = (B, B_BIAS)
    tensors = {n: (t.double() * factor).to(t.dtype) if n.endswith(ends) else t for n, t in adapter.tensors.items()}
    return adapter.replace(tensors)


def added(adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None = None) -> Summed:
    """Gives sum_k w_k s_k B_k A_k as one adapter: stacked and exact, of rank sum r_k, or its best `rank` by the QR-core, balanced.

    A module that only some have is theirs alone. The base is that of all. Raises UserError for bases that differ and what has no sum.
    """
    _check(adapters, weights, averages=math.isclose(sum(weights), 1.0, abs_tol=1e-9))
    wholes = {m: _whole(adapters, weights, m) for m in modules_of({n: n for a in adapters for n in a.tensors})}
    pairs = {m: whole if rank is None else _best(whole, rank) for m, whole in wholes.items()}
    config = _config(adapters, pairs)
    rows = max(pair.rank for pair in pairs.values()) if config.get("target_parameters") else 0
    stored = {
        m: (_padded(p.left, rows).float(), _padded(p.right.T, rows).T.float().contiguous()) for m, p in pairs.items()
    }
    tensors = {name: t for m, (b, a) in stored.items() for name, t in ((m.b, b), (m.a, a))}
    tensors |= {name: _plain(adapters, weights, name) for name in plain_of({n: n for a in adapters for n in a.tensors})}
    if config["lora_bias"]:  # PEFT gives every module one then
        lacking = {_bias_of(m): m for m in pairs if _bias_of(m) not in tensors}
        tensors |= {name: torch.zeros(stored[m][0].shape[0]) for name, m in lacking.items()}
    prints = {a.base_fingerprint for a in adapters}
    made = Adapter(tensors, config, prints.pop() if len(prints) == 1 else None)
    return Summed(adapter=made, error=_error(wholes, stored), rank=max(int(a.shape[0]) for _, a in stored.values()))


def apart(first: Adapter, second: Adapter) -> tuple[Apart, ...]:
    """Measures two adapters module by module, in float64, then their plain tensors entry by entry. A module of one alone is 0 in the other."""
    scales = [scales_of(a.peft_config, a.tensors) for a in (first, second)]
    both = {**first.tensors, **second.tensors}
    modules = tuple(_product_apart(m, (first, second), scales) for m in modules_of(both))
    return (*modules, *(_plain_apart(name, first.tensors, second.tensors) for name in plain_of(both)))


def pooled(found: Sequence[Apart], name: str) -> Apart:
    """Gives all products among them as one long vector."""
    found = [one for one in found if one.product]
    inner = sum((one.cosine or 0.0) * one.first * one.second for one in found)
    first, second, difference = (
        math.sqrt(sum(norm**2 for norm in norms))
        for norms in zip(*((o.first, o.second, o.difference or 0.0) for o in found), strict=True)
    )
    return _apart(name, first, second, difference, inner)


def config_differences(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Gives every key in which two PEFT configs differ, with both values; lists that stand for sets are compared as such."""
    keys = sorted({*first, *second})
    return {
        key: (first.get(key), second.get(key))
        for key in keys
        if _comparable(first.get(key)) != _comparable(second.get(key))
    }


def _comparable(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, list | tuple | set) else value


def _check(adapters: Sequence[Adapter], weights: Sequence[float], averages: bool) -> None:
    """Raises UserError naming all that stands against the sum. averages: weights sum to 1, so that values of the base may be averaged."""
    faults = [f"weight {weight} is no finite number" for weight in weights if not math.isfinite(weight)]
    if len(adapters) != len(weights):
        faults.append(f"{len(adapters)} adapters, but {len(weights)} weights: give one for each")
    for adapter in adapters:
        if adapter.sidecar:
            faults.append("an adapter with a side-car beside it is summed when it is exported as one PEFT folder")
        if adapter.peft_config.get("peft_type", "LORA") != "LORA":
            faults.append(
                f"peft_type={adapter.peft_config['peft_type']!r}: only LoRA adapters are products that can be summed"
            )
        odd = [(name, why) for name in plain_of(adapter.tensors) if (why := _no_sum(name, averages, adapters))]
        faults += [
            f"{name} {why}" + (f" (and {len(odd) - 1} tensors more)" if len(odd) > 1 else "") for name, why in odd[:1]
        ]
    faults += [*_other_bases(adapters), *_without_place(adapters)]
    if faults:
        raise UserError(*dict.fromkeys(faults))


def _no_sum(name: str, averages: bool, adapters: Sequence[Adapter]) -> str:
    """Says why a plain tensor has no sum; empty where it has one."""
    if MAGNITUDE in name:
        return "is a magnitude of DoRA: its adapters multiply what they stand on, and products of them are no sum; merge each into the base, or train without use_dora"
    if name.endswith(B_BIAS):
        return ""
    if ".lora_" in name:
        return "belongs to a variant whose product is not s B A: only plain LoRA has sums"
    if not averages:
        return "stands for a value of the base (a bias or a saved module), so it has no sum or multiple, only an average: let the weights sum to 1, or leave such tensors out of the adapter"
    if not all(name in other.tensors for other in adapters):
        return "stands in some of the adapters only, so it has no average"
    return ""


def _other_bases(adapters: Sequence[Adapter]) -> list[str]:
    prints = sorted({str(a.base_fingerprint) for a in adapters if a.base_fingerprint is not None})
    if len(prints) > 1:
        return [
            f"the adapters belong to different bases (fingerprints {', '.join(prints)}): only adapters of one base have a sum"
        ]
    names = sorted({str(a.peft_config.get("base_model_name_or_path")) for a in adapters})
    if len(names) > 1 and any(a.base_fingerprint is None for a in adapters):
        return [
            f"the adapters name different bases ({', '.join(names)}), and not all carry a fingerprint: correct base_model_name_or_path in adapter_config.json"
        ]
    return []


def _without_place(adapters: Sequence[Adapter]) -> list[str]:
    """A sum has one config, and PEFT's lora_bias is of all its modules."""
    known = [adapter.peft_config for adapter in adapters]
    if any(c.get("lora_bias") for c in known) and any(c.get("target_parameters") for c in known):
        return [
            "lora_bias in one adapter beside target_parameters in another: PEFT has no bias beside fused experts, so that one config cannot say both; train without lora_bias"
        ]
    return []


def _whole(adapters: Sequence[Adapter], weights: Sequence[float], module: Module) -> LowRank:
    having = [
        (adapter, weight) for adapter, weight in zip(adapters, weights, strict=True) if module.a in adapter.tensors
    ]
    parts = [
        product_of(read_factors(a.tensors, module, scales_of(a.peft_config, a.tensors)[module.name])) for a, _ in having
    ]
    sizes = {(part.left.shape[0], part.right.shape[1]) for part in parts}
    if len(sizes) > 1:
        raise UserError(
            f"{module.name} has another size in each adapter ({', '.join(map(str, sorted(sizes)))}): they belong to different bases"
        )
    return weighted_sum([weight for _, weight in having], parts)


def _best(whole: LowRank, rank: int) -> LowRank:
    """The best approximation of that rank; a direction without weight keeps a row of A, so that it can still be learnt."""
    svd = truncated_svd(whole, min(rank, whole.rank, whole.left.shape[0], whole.right.shape[1]))
    rounding = SMALLEST * float(whole.left.norm() * whole.right.norm())  # what is left where terms cancel
    svd = replace(svd, s=torch.where(svd.s > rounding, svd.s, torch.zeros_like(svd.s)))
    spare = whole.right[: len(svd.s)]
    if svd.is_zero:
        return LowRank(torch.zeros_like(svd.u), spare)
    left, right = balanced(svd, spare)
    return LowRank(left, right)


def _padded(columns: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(columns, (0, max(width - columns.shape[1], 0))).contiguous()


def _plain(adapters: Sequence[Adapter], weights: Sequence[float], name: str) -> torch.Tensor:
    """The sum of biases beside B, each times its scale, or the average of what stands for a value of the base."""
    total: torch.Tensor | None = None
    for adapter, weight in zip(adapters, weights, strict=True):
        if name in adapter.tensors:
            share = weight
            if name.endswith(B_BIAS):
                path = name.removesuffix(B_BIAS).removeprefix("base_model.model.")
                share *= scales_of(adapter.peft_config, adapter.tensors)[path]
            part = adapter.tensors[name].double() * share
            total = part if total is None else total + part
    assert total is not None
    return total.float()


def _bias_of(module: Module) -> str:
    return module.b.removesuffix(".weight") + ".bias"


def _config(adapters: Sequence[Adapter], pairs: Mapping[Module, LowRank]) -> dict[str, object]:
    """PEFT's config of the sum: scale 1, ranks that differ by a pattern that names each module (with experts all are padded to one rank, for PEFT tells theirs by r alone)."""
    known = [adapter.peft_config for adapter in adapters]
    config = {
        **known[0],
        "use_rslora": False,
        "init_lora_weights": True,
        "lora_bias": any(c.get("lora_bias") for c in known),
    }
    parameters = sorted({str(name) for c in known for name in _listed(c.get("target_parameters"))})
    if any(_comparable(c.get(key)) != _comparable(known[0].get(key)) for c in known for key in WHERE):
        config |= dict.fromkeys(WHERE)
        config["target_modules"] = [m.name for m in pairs if not _is_expert(m, parameters)]
        config["target_parameters"] = parameters or None
    ranks = {module.name: pair.rank for module, pair in pairs.items()}
    return config_of_ranks(config, dict.fromkeys(ranks, max(ranks.values())) if parameters else ranks)


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple | set) else []


def _is_expert(module: Module, parameters: Sequence[str]) -> bool:
    path, _, number = module.name.replace(".base_layer", "").rpartition(".")
    return number.isdigit() and any(path.endswith(name.rpartition(".")[0]) for name in parameters)


def _error(wholes: Mapping[Module, LowRank], stored: Mapping[Module, tuple[torch.Tensor, torch.Tensor]]) -> float:
    exact = lost = 0.0
    for module, whole in wholes.items():
        b, a = stored[module]
        products = inner_products([whole, LowRank(b.double(), a.double())])
        exact += max(float(products[0, 0]), 0.0)
        lost += max(float(products[0, 0] - 2 * products[0, 1] + products[1, 1]), 0.0)
    return math.sqrt(lost / exact) if exact > 0 else 0.0


def _product_apart(module: Module, both: Sequence[Adapter], scales: Sequence[Mapping[str, float]]) -> Apart:
    having = [
        read_factors(a.tensors, module, s[module.name])
        for a, s in zip(both, scales, strict=True)
        if module.a in a.tensors
    ]
    if len(having) == 1:
        own = math.sqrt(squared_norm(product_of(having[0])))
        first, second = (own, 0.0) if module.a in both[0].tensors else (0.0, own)
        return _apart(module.name, first, second, own, 0.0)
    old, new = having
    if (old.b.shape[0], old.a.shape[1]) != (new.b.shape[0], new.a.shape[1]):
        raise UserError(f"{module.name} has another size in each adapter: they belong to different bases")
    products = inner_products([product_of(old), product_of(new)])
    first, second = (math.sqrt(max(float(products[i, i]), 0.0)) for i in (0, 1))
    return _apart(module.name, first, second, math.sqrt(squared_norm(update_of(new, old))), float(products[0, 1]))


def _plain_apart(name: str, first: Tensors, second: Tensors) -> Apart:
    one = next(tensors[name] for tensors in (first, second) if name in tensors)
    old, new = (tensors.get(name, torch.zeros_like(one)).double() for tensors in (first, second))
    if old.shape != new.shape:
        raise UserError(
            f"{name} has another shape in each adapter ({tuple(old.shape)}, {tuple(new.shape)}): they belong to different bases"
        )
    found = _apart(name, float(old.norm()), float(new.norm()), float((new - old).norm()), float((old * new).sum()))
    known = (name in first and name in second) or name.endswith(B_BIAS)  # a bias of LoRA's own that is not there is 0
    return replace(found, product=False) if known else replace(found, product=False, difference=None, relative=None)


def _apart(name: str, first: float, second: float, difference: float, inner: float) -> Apart:
    cosine = max(-1.0, min(1.0, inner / (first * second))) if first > 0 and second > 0 else None
    return Apart(
        name=name,
        first=first,
        second=second,
        difference=difference,
        relative=difference / first if first > 0 else None,
        cosine=cosine,
    )
