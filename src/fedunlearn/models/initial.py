"""What a fresh adapter begins with: drawn factors, or those of the base's own weights beside a side-car that takes them out again.

PiSSA (Meng et al. 2024, arXiv:2404.02948) and OLoRA (Bueyuekakyuez 2024, arXiv:2406.01775) take s B0 A0 out of the base; here it stands, negative, in a
side-car, and the base stays as it is stored. DoRA's magnitudes (Liu et al. 2024, arXiv:2402.09353) are the norms of the base's rows.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight

from fedunlearn.aggregation.factors import Module, fresh_a, modules_of
from fedunlearn.errors import UserError
from fedunlearn.models.adalora import drawn_triplets
from fedunlearn.models.adapter_tensors import ACTIVE, live_tensors, lora_layers
from fedunlearn.models.base_biases import stored_biases
from fedunlearn.models.saved_modules import stored_values
from fedunlearn.records.adapter import B_BIAS, MAGNITUDE, Tensors
from fedunlearn.seeds import seed_of

KEY = "model.model_args.lora_config.init_lora_weights"
_FOUND: "WeakKeyDictionary[PeftModel, tuple[tuple[str, int | None], tuple[Tensors, Tensors]]]" = WeakKeyDictionary()
"""What was found last of each model's base, and for what: an initialisation, and a seed where it matters."""


def from_base(initial: bool | str | None) -> bool:
    """Whether an initialisation begins with factors of the base's own weights."""
    return isinstance(initial, str) and initial.startswith(("pissa", "olora"))


def draw_fresh(model: PeftModel, seed: int, initial: bool | str = True) -> Tensors:
    """Gives the active adapter fresh values, and gives the side-car that belongs beside them (empty but for pissa and olora).

    initial: true (A uniform in +-1/sqrt(d_in), as PEFT draws it, B zero), gaussian, orthogonal, pissa, pissa_niter_N, olora. Magnitudes are the
    base's own norms, biases and saved modules the base's own values, LoRA's biases zero, AdaLoRA's singular values zero between normal factors: the model then says what the base says. Drawn on the CPU from a
    generator of its own, so that device and global random state do not matter; what is made of the base's weights is made on its device, and kept until
    another is asked for. Raises UserError for an initialisation that these layers cannot have, ValueError for a tensor that is none of these.
    """
    live = live_tensors(model)
    modules = modules_of(live)
    if from_base(initial):
        pairs, sidecar = _of_base(model, str(initial), seed, modules)
    else:
        generator = torch.Generator().manual_seed(seed_of("lora init", seed))
        pairs, sidecar = _drawn(live, modules, initial, generator), {}
    values = {**pairs, **_plain(model)}
    odd = sorted(set(live) - set(values))
    if odd:
        raise ValueError(f"adapter tensor {odd[0]!r} is no factor, magnitude, bias or saved module")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(values[name])
    return sidecar


def _plain(model: PeftModel) -> dict[str, torch.Tensor]:
    """The fresh values of all tensors that are no factors."""
    plain = {**stored_values(model), **stored_biases(model)}
    for path, layer in lora_layers(model):
        if ACTIVE in layer.lora_magnitude_vector:
            plain[path + MAGNITUDE] = torch.linalg.norm(_weight(layer), dim=1)
        bias = getattr(dict(layer.lora_B.items()).get(ACTIVE), "bias", None)  # AdaLoRA's B is no module
        if bias is not None:
            plain[path + B_BIAS] = torch.zeros_like(bias)
    return plain


def _weight(layer: Any) -> torch.Tensor:
    """The base's weight of one layer, [d_out, d_in] float32, on its device; Conv1D holds it the other way round."""
    weight: torch.Tensor = dequantize_module_weight(layer.get_base_layer()).detach().float()
    return weight.T if layer.fan_in_fan_out else weight


def _drawn(
    live: Tensors, modules: tuple[Module, ...], initial: bool | str, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    draw = {True: _uniform, "gaussian": _gaussian, "orthogonal": _orthogonal}[initial]
    values: dict[str, torch.Tensor] = {}
    for module in modules:
        values[module.a], values[module.b] = draw(module, live[module.a].shape, live[module.b].shape, generator)
    return {**values, **drawn_triplets(live, generator)}


def _uniform(
    module: Module, a: torch.Size, b: torch.Size, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    return fresh_a(a, generator), torch.zeros(b)


def _gaussian(
    module: Module, a: torch.Size, b: torch.Size, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A normal with standard deviation 1 / r, as PEFT draws it."""
    return torch.randn(a, generator=generator) / a[0], torch.zeros(b)


def _orthogonal(
    module: Module, a: torch.Size, b: torch.Size, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B over halves of one orthogonal matrix, so that neither is zero and B A is, as PEFT draws them."""
    rank, d_in = a
    if rank % 2:
        raise UserError(
            f"{KEY}=orthogonal with rank {rank} of module {module.name!r}: it gives one half of the rank to A and one to B; choose an even r"
        )
    turned, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    half_a = torch.randn(d_in, rank // 2, generator=generator) @ turned[0::2]
    half_b = torch.randn(b[0], rank // 2, generator=generator) @ turned[1::2]
    return half_a.T / 10, half_b / 10


def _of_base(model: PeftModel, initial: str, seed: int, modules: tuple[Module, ...]) -> tuple[Tensors, Tensors]:
    """Factors of the base's own weights, and the side-car that takes their product out again, on the CPU; kept until another is asked for."""
    key = (initial, seed if "niter" in initial else None)
    known = _FOUND.get(model)
    if known is None or known[0] != key:
        known = _FOUND[model] = key, _found(model, initial, seed, modules)
    return known[1]


def _found(model: PeftModel, initial: str, seed: int, modules: tuple[Module, ...]) -> tuple[Tensors, Tensors]:
    layers = dict(lora_layers(model))
    pairs: dict[str, torch.Tensor] = {}
    sidecar: dict[str, torch.Tensor] = {}
    for module in modules:
        path = module.a.removesuffix(".lora_A.weight")
        _check_layer(initial, module, layers.get(path))
        layer = layers[path]
        b, a = _factors(initial, seed, _weight(layer), layer.r[ACTIVE], float(layer.scaling[ACTIVE]))
        pairs |= {module.a: a.cpu().contiguous(), module.b: b.cpu().contiguous()}
        sidecar |= {module.a: pairs[module.a], module.b: (pairs[module.b] * -float(layer.scaling[ACTIVE]))}
    return pairs, sidecar


def _check_layer(initial: str, module: Module, layer: Any) -> None:
    if layer is None or isinstance(layer, ParamWrapper):
        raise UserError(
            f"{KEY}={initial} beside fused experts ({module.name}): a side-car cannot stand beside them; leave it at true, or the experts out of the targets"
        )
    if layer.r[ACTIVE] > min(layer.in_features, layer.out_features):
        raise UserError(
            f"{KEY}={initial} with rank {layer.r[ACTIVE]} of module {module.name!r}, whose sides are {layer.out_features} and {layer.in_features}: its weight "
            f"has {min(layer.in_features, layer.out_features)} directions at most; lower r to that, or leave the module out"
        )


def _factors(
    initial: str, seed: int, weight: torch.Tensor, rank: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """B0 [d_out, r] and A0 [r, d_in], float32: s B0 A0 is the main part of the weight (pissa), B0 A0 a part of it by columns of its QR (olora)."""
    if initial == "olora":
        q, upper = torch.linalg.qr(weight)
        return q[:, :rank], upper[:rank]
    u, s, vt = _truncated(initial, seed, weight, rank)
    turn = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)  # a sign of one's own choice
    root = (s / scale).sqrt()
    return u * turn * root, (vt * turn.T) * root[:, None]


def _truncated(
    initial: str, seed: int, weight: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if initial == "pissa":
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    with torch.random.fork_rng():  # svd_lowrank takes no generator
        torch.manual_seed(seed_of("pissa", seed))
        u, s, v = torch.svd_lowrank(weight, q=rank, niter=int(initial.removeprefix("pissa_niter_")))
    return u, s, v.T
