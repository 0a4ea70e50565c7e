"""An adapter merged into weights of lower precision: what becomes of an unlearning when the model is shipped that way."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import ACTIVE, read_tensors, write_tensors
from fedunlearn.models.saved_modules import saved_modules
from fedunlearn.models.sidecar import put_sidecar, sidecar_delta
from fedunlearn.records.adapter import MAGNITUDE, A, B

Cast = Literal["bfloat16", "int8", "nf4"]
Backend = Literal["simulated", "bitsandbytes"]
NF4_BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NormalFloat-4 (QLoRA, arXiv:2305.14314, appendix E)."""


def bfloat16(weight: torch.Tensor) -> torch.Tensor:
    """Rounds a float32 weight to bfloat16."""
    return weight.bfloat16().float()


def int8(weight: torch.Tensor) -> torch.Tensor:
    """Rounds each output row [d_out, d_in] to 255 steps of its largest magnitude / 127, symmetric about 0 (arXiv:2208.07339, without its outlier columns)."""
    step = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / step).round().clamp(-127, 127) * step


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """Rounds blocks of 64 consecutive weights to NF4 values times the block's largest magnitude; a last, shorter block has its own. Scales stay float32 (no double quantisation)."""
    flat = weight.reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % NF4_BLOCK)]).view(-1, NF4_BLOCK)
    scale = padded.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    table = torch.tensor(NF4, device=weight.device)
    middles = (table[1:] + table[:-1]) / 2
    rounded = table[torch.bucketize(padded / scale, middles)] * scale
    return rounded.view(-1)[: len(flat)].view_as(weight)


SIMULATED: Mapping[Cast, Callable[[torch.Tensor], torch.Tensor]] = {"bfloat16": bfloat16, "int8": int8, "nf4": nf4}


def cast_of(cast: Cast, backend: Backend) -> Callable[[torch.Tensor], torch.Tensor]:
    """Gives the function that casts a float32 weight and gives it back as float32. Raises UserError where the backend is not there."""
    if backend == "simulated" or cast == "bfloat16":
        return SIMULATED[cast]
    try:
        kernels = importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise UserError(
            f"probe.backend=bitsandbytes: {cast} needs the package ({error}): pip install bitsandbytes, or set it to simulated, which rounds the same way in float32"
        ) from error
    if not torch.cuda.is_available():
        raise UserError(
            f"probe.backend=bitsandbytes: {cast} needs a CUDA device, and there is none: set it to simulated, which rounds the same way in float32"
        )
    return lambda weight: _by_kernels(kernels, cast, weight)


def _by_kernels(kernels: Any, cast: Cast, weight: torch.Tensor) -> torch.Tensor:
    if cast == "nf4":
        found, state = kernels.quantize_4bit(weight.half().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        rounded: torch.Tensor = kernels.dequantize_4bit(found, state).float()
        return rounded
    found, scales, _ = kernels.int8_vectorwise_quant(weight.half().contiguous())
    back: torch.Tensor = kernels.int8_vectorwise_dequant(found, scales).float()
    return back


@torch.no_grad()
def merge_and_cast(model: PeftModel, cast: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Puts cast(W + s B A + side-car) in the place of every linear weight W [d_out, d_in] but the head's, and lets the adapter's factors add nothing any more.

    Under DoRA that sum is scaled to its magnitudes first. Biases and modules that were trained whole stay as they are. One weight at a time, in place: the
    base is spoilt and must be loaded again. Weights keep their dtype.
    """
    after = {name: torch.zeros_like(t) if name.endswith((A, B)) else t for name, t in read_tensors(model).items()}
    for path, layer, weight in _linear_weights(model):
        whole = weight.float()
        magnitude = path + MAGNITUDE
        if isinstance(layer, LoraLayer):
            whole = whole + layer.get_delta_weight(ACTIVE).float() + sidecar_delta(model, path, weight)
        along = 0 if getattr(layer, "fan_in_fan_out", False) else 1
        if magnitude in after:
            wanted = after[magnitude].to(whole.device).unsqueeze(along)
            whole = whole * wanted / whole.norm(dim=along, keepdim=True)
        weight.copy_(cast(whole).to(weight.dtype))
        if magnitude in after:
            after[magnitude] = weight.float().norm(dim=along)
    write_tensors(model, after)
    put_sidecar(model, {}, ACTIVE)


def _linear_weights(model: PeftModel) -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Every linear layer by its path, as PEFT sees it: with LoRA its base layer's weight. The head, what belongs to LoRA and modules that are trained whole are left out."""
    whole = {id(part) for _, module in saved_modules(model) for part in module.modules()}
    head = model.get_output_embeddings()
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            yield path, layer, layer.get_base_layer().weight
        elif id(layer) in whole or layer is head:
            continue
        elif isinstance(layer, nn.Linear) and ".lora_" not in path and "base_layer" not in path:
            yield path, layer, layer.weight
