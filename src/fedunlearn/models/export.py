"""One plain PEFT adapter out of trainable factors and a side-car: all of it stacked, or its best rank r."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fedunlearn.aggregation.factors import Factors, config_of_ranks, modules_of, plain_of, read_factors, scales_of
from fedunlearn.aggregation.gauges.svd import balanced
from fedunlearn.aggregation.product import LowRank, product_of, truncated_svd, weighted_sum
from fedunlearn.models.adalora import folded
from fedunlearn.records.adapter import B_BIAS, Adapter, B, Tensors

ExportRank = Literal["exact", "r"]


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """What the trainable factors of a stacked adapter were: the next stage begins with fresh ones of that shape, the stack as side-car."""

    r: int
    lora_alpha: float


def export(adapter: Adapter, rank: ExportRank) -> tuple[Adapter, Stacked | None]:
    """Gives an adapter without side-car, and what it was where it is now a stack; one without a side-car comes back as it is, AdaLoRA's as plain LoRA (models.adalora.folded).

    `exact`: [s B, side-car's B] and [A; side-car's A], saved with lora_alpha = R (sqrt(R) under rsLoRA), so that PEFT's own factor is 1 and
    the scales sit in B and in LoRA's own biases. `r`: the best rank-r approximation of that sum, balanced, with the adapter's own scale. Raises ValueError
    for a side-car beside DoRA's magnitudes, which no sum of products is.
    """
    if not adapter.sidecar:
        return folded(adapter), None
    if adapter.peft_config.get("use_dora"):
        raise ValueError("a side-car beside DoRA's magnitudes is no adapter of either kind")
    scales = scales_of(adapter.peft_config, adapter.tensors)
    wholes = {
        m: _whole(adapter, read_factors(adapter.tensors, m, scales[m.name]), m.a, m.b)
        for m in modules_of(adapter.tensors)
    }
    if rank == "r":
        return adapter.replace(_cut(adapter, {m.a: w for m, w in wholes.items()}, scales), {}), None
    tensors = {
        name: t
        for m, w in wholes.items()
        for name, t in ((m.b, w.left.float().contiguous()), (m.a, w.right.float().contiguous()))
    }
    tensors |= plain_scaled(adapter.tensors, scales)
    ranks = {m.name: w.rank for m, w in wholes.items()}
    known = adapter.peft_config
    stacked = Stacked(r=int(str(known["r"])), lora_alpha=float(str(known["lora_alpha"])))
    return Adapter(tensors, config_of_ranks(known, ranks), adapter.base_fingerprint), stacked


def plain_scaled(tensors: Tensors, scales: Mapping[str, float], by: int = 1) -> dict[str, torch.Tensor]:
    """Gives the plain tensors with LoRA's own biases, which PEFT multiplies by s, times s; by=-1: divided by it. scales: s by module name."""
    plain = {name: tensors[name] for name in plain_of(tensors)}
    for module in modules_of(tensors):
        bias = module.b.removesuffix(B) + B_BIAS
        if bias in plain and scales[module.name] != 1.0:
            plain[bias] = (plain[bias].double() * scales[module.name] ** by).to(plain[bias].dtype)
    return plain


def unit_scaled(adapter: Adapter) -> Tensors:
    """Gives an adapter's factors with its scales folded into B: what a side-car holds."""
    scales, plain = scales_of(adapter.peft_config, adapter.tensors), plain_of(adapter.tensors)
    folded = {name: tensor for name, tensor in adapter.tensors.items() if name not in plain}
    for module in modules_of(adapter.tensors):
        if scales[module.name] != 1.0:
            folded[module.b] = (folded[module.b].double() * scales[module.name]).to(folded[module.b].dtype)
    return folded


def _whole(adapter: Adapter, own: Factors, a: str, b: str) -> LowRank:
    if a not in adapter.sidecar:
        return product_of(own)
    return weighted_sum(
        [1.0, 1.0], [product_of(own), LowRank(adapter.sidecar[b].double(), adapter.sidecar[a].double())]
    )


def _cut(adapter: Adapter, wholes: Mapping[str, LowRank], scales: Mapping[str, float]) -> Tensors:
    cut = {name: adapter.tensors[name] for name in plain_of(adapter.tensors)}
    for module in modules_of(adapter.tensors):
        own = read_factors(adapter.tensors, module, scales[module.name])
        svd = truncated_svd(wholes[module.a], own.rank)
        b, a = balanced(svd, own.double.a)
        dtype = own.a.dtype
        share = 1 / math.sqrt(own.scale)
        cut |= {module.b: (b * share).to(dtype).contiguous(), module.a: (a * share).to(dtype).contiguous()}
    return cut
