"""LoRA factors of one module: which tensors belong together, the scale s of their product, and a client's own rank."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fedunlearn.aggregation.adalora import scales_of_triplets
from fedunlearn.records.adapter import A, B, Tensors
from fedunlearn.records.shape import ClientShape, lora_scale


@dataclass(frozen=True, order=True)
class Module:
    """One LoRA target. name: path in the base, as in `model.layers.0.self_attn.q_proj`; a, b: the names of its two tensors."""

    name: str
    a: str
    b: str


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's update of the base: scale * b @ a. b [d_out, r], a [r, d_in], same dtype."""

    b: torch.Tensor
    a: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return int(self.a.shape[0])

    @property
    def double(self) -> "Factors":
        """The same in float64, made once; itself where it is so already (not cached: what names itself is freed by the collector alone, too late)."""
        return self if self.b.dtype == self.a.dtype == torch.float64 else self._cast

    @cached_property
    def _cast(self) -> "Factors":
        return Factors(self.b.double(), self.a.double(), self.scale)


def modules_of(names: Iterable[str]) -> tuple[Module, ...]:
    """Pairs the factors of an adapter, in name order; plain tensors are no part of it. Raises ValueError for a factor without its partner."""
    firsts, seconds = set(), set()
    for name in names:
        if name.endswith(A):
            firsts.add(name.removesuffix(A))
        elif name.endswith(B):
            seconds.add(name.removesuffix(B))
    for path in sorted(firsts ^ seconds):
        raise ValueError(f"adapter tensor {path + (A if path in firsts else B)!r} is a LoRA factor without a partner")
    return tuple(Module(path.removeprefix("base_model.model."), path + A, path + B) for path in sorted(firsts))


def plain_of(names: Iterable[str]) -> tuple[str, ...]:
    """Gives the tensors of an adapter that are no factors, in name order."""
    return tuple(sorted(name for name in names if not name.endswith((A, B))))


def scale_of(peft_config: Mapping[str, object], module: Module, rank: int) -> float:
    """Gives s = lora_alpha / r (rsLoRA: / sqrt(r)) of one module, lora_alpha as alpha_pattern has it where a pattern matches."""
    alpha = peft_config["lora_alpha"]
    patterns = peft_config.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if re.match(rf"(.*\.)?({pattern})$", module.name):
            alpha = value
            break
    return lora_scale(float(str(alpha)), rank, bool(peft_config.get("use_rslora")))


def scales_of(peft_config: Mapping[str, object], tensors: Tensors) -> dict[str, float]:
    """Gives s of every module of an adapter, AdaLoRA's triplets among them, by module name."""
    pairs = {m.name: scale_of(peft_config, m, tensors[m.a].shape[0]) for m in modules_of(tensors)}
    return {**pairs, **scales_of_triplets(peft_config, tensors)}


def config_of_ranks(known: Mapping[str, object], ranks: Mapping[str, int], scale: float = 1.0) -> dict[str, object]:
    """Gives a PEFT config with these ranks by module, in which every module's s is `scale`: the largest rank is r, a pattern names each module of another.

    use_rslora in `known` says which alpha that is.
    """
    largest = max(ranks.values())
    alphas = {rank: scale * (math.sqrt(rank) if known.get("use_rslora") else float(rank)) for rank in ranks.values()}
    other = {name: rank for name, rank in ranks.items() if rank != largest}
    patterns = {"rank_pattern": other, "alpha_pattern": {name: alphas[rank] for name, rank in other.items()}}
    return {**known, "r": largest, "lora_alpha": alphas[largest], **patterns}


def read_factors(tensors: Tensors, module: Module, scale: float) -> Factors:
    """Gives one module of an adapter."""
    return Factors(tensors[module.b], tensors[module.a], scale)


def cut_to(shape: ClientShape, tensors: Tensors, scales: Mapping[str, float]) -> Tensors:
    """Gives what a client of that rank is sent of an adapter: the first r_k rows of A and columns of B, each times sqrt(s / s_k).

    scales: s of the adapter by module name. The product of what is sent, times s_k, is s times the product of the first r_k
    columns and rows. Where rank and scale are the adapter's own the tensors are the same, bit by bit; plain ones always are.
    """
    cut = {name: tensors[name] for name in plain_of(tensors)}
    for module in modules_of(tensors):
        share = math.sqrt(scales[module.name] / shape.scale)
        cut[module.a] = _times(tensors[module.a][: shape.rank], share)
        cut[module.b] = _times(tensors[module.b][:, : shape.rank], share)
    return cut


def _times(tensor: torch.Tensor, share: float) -> torch.Tensor:
    return tensor.contiguous() if share == 1.0 else (tensor.double() * share).to(tensor.dtype)


def padded_to(rank: int, scale: float, factors: Factors) -> Factors:
    """Gives the same product at a larger rank and another scale: zero columns and rows, both factors times sqrt(s_k / s).

    Raises ValueError for a rank above `rank`.
    """
    if factors.rank > rank:
        raise ValueError(f"factors of rank {factors.rank} cannot be padded to {rank}")
    share = math.sqrt(factors.scale / scale)
    extra = rank - factors.rank
    b, a = (factors.b, factors.a) if share == 1.0 else (factors.b * share, factors.a * share)
    return Factors(torch.nn.functional.pad(b, (0, extra)), torch.nn.functional.pad(a, (0, 0, 0, extra)), scale)


def side_by_side(blocks: Sequence[Tensors]) -> Tensors:
    """Gives blocks of factors as one: A's rows below each other, B's columns beside each other; empty for none."""
    if not blocks:
        return {}
    return {key: torch.cat([block[key] for block in blocks], dim=0 if key.endswith(A) else 1) for key in blocks[0]}


def fresh_a(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Gives a fresh A as PEFT draws it, float32: uniform in +-1/sqrt(d_in)."""
    values = torch.empty(shape)
    torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values
