"""AdaLoRA's layers in the model, and its adapter folded into a plain LoRA one when a run ends."""

from collections.abc import Mapping
from dataclasses import fields

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer

from fedunlearn.aggregation.adalora import AdaLora, Triplets, as_pair, scales_of_triplets, triplets_of
from fedunlearn.aggregation.factors import config_of_ranks
from fedunlearn.models.adapter_tensors import ACTIVE
from fedunlearn.records.adapter import A as PAIR_A
from fedunlearn.records.adapter import Adapter, Tensors
from fedunlearn.records.adapter import B as PAIR_B

DEVIATION = 0.02
"""PEFT draws A and B normal with this standard deviation; E begins at 0, so that the model says what the base says."""


def adalora_config(values: Mapping[str, object], budget: AdaLora) -> AdaLoraConfig:
    """Gives PEFT's config. values: those of config.lora.given.

    total_step is the least that PEFT takes: its own allocator is not asked, and how many rounds there are is the run's business. rank_pattern stays empty: PEFT would
    prune by it what is read out of the model.
    """
    own = {field.name: getattr(budget, field.name) for field in fields(budget)}
    return AdaLoraConfig(**{**values, **own, "total_step": budget.least_rounds})


def is_adalora(config: LoraConfig) -> bool:
    """Whether the layers are AdaLoRA's."""
    return isinstance(config, AdaLoraConfig)


def penalty_weight(model: PeftModel) -> float:
    """Gives the orth_reg_weight that the trained adapter has; 0 for plain LoRA, which has no such penalty."""
    config = model.peft_config[ACTIVE]
    return float(config.orth_reg_weight) if is_adalora(config) else 0.0


def freeze_ranks(model: PeftModel) -> None:
    """Keeps what PEFT divides by out of training: on a base that is not float32 its cast makes a trained parameter of it, rounded."""
    for layer in model.modules():
        for name, ranknum in layer.ranknum.items() if isinstance(layer, AdaLoraLayer) else ():
            ranknum.requires_grad_(False)
            ranknum.data = ranknum.data.float().fill_(float(layer.r[name]))


def drawn_triplets(live: Tensors, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Gives fresh values of an AdaLoRA adapter's own tensors; empty for another adapter. live: the adapter's tensors."""
    values: dict[str, torch.Tensor] = {}
    for module in triplets_of(live):
        for name in (module.a, module.b):
            values[name] = torch.randn(live[name].shape, generator=generator) * DEVIATION
        values[module.e] = torch.zeros(live[module.e].shape)
    return values


def folded(adapter: Adapter) -> Adapter:
    """Gives an AdaLoRA adapter as a plain LoRA one with the same product, float32; another adapter as it is.

    Ranks with E = 0 are left out; a module that has no other keeps its first, with B zero: it adds nothing, and can learn in a later stage. The root
    of |E| goes into each factor. rank_pattern and alpha_pattern name the modules whose rank is not the largest, so that s is the same everywhere.
    """
    modules = triplets_of(adapter.tensors)
    if not modules:
        return adapter
    own = {name for m in modules for name in (m.a, m.e, m.b)}
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if name not in own}
    ranks: dict[str, int] = {}
    for module in modules:
        a, b = _folded(adapter.tensors, module)
        tensors |= {module.path + PAIR_A: a, module.path + PAIR_B: b}
        ranks[module.path.removeprefix("base_model.model.")] = len(a)
    (scale,) = set(scales_of_triplets(adapter.peft_config, adapter.tensors).values())
    return Adapter(tensors, _plain(adapter.peft_config, ranks, scale), adapter.base_fingerprint, adapter.sidecar)


def _folded(tensors: Tensors, module: Triplets) -> tuple[torch.Tensor, torch.Tensor]:
    e = tensors[module.e]
    acts = e[:, 0] != 0
    if not bool(acts.any()):
        return tensors[module.a][:1].clone(), torch.zeros_like(tensors[module.b][:, :1])
    a, b = as_pair(tensors[module.a][acts], e[acts], tensors[module.b][:, acts])
    return a.float().contiguous(), b.float().contiguous()


def _plain(known: Mapping[str, object], ranks: Mapping[str, int], scale: float) -> dict[str, object]:
    """PEFT's config of the folded adapter: LoRA's keys alone."""
    plain = {field.name: known[field.name] for field in fields(LoraConfig) if field.name in known}
    return config_of_ranks({**plain, "peft_type": "LORA"}, ranks, scale)
