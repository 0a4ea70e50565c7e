"""Adapters merged into the base's weights, and taken out again bit by bit.

PEFT subtracts on the way back, which leaves a third of the entries changed; here what is overwritten is kept and put back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import lora_layers
from fedunlearn.models.saved_modules import narrow_saved
from fedunlearn.models.sidecar import acting_factors

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ENTRIES = 2**20
"""Entries of a weight that are summed at once: what is held of it in float64 (8 MiB a copy), however large it is."""
Rows = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class CastLoss:
    """What became of a change when it was stored. error: ||applied - wanted|| / ||wanted|| over all merged weights, 0 where nothing was wanted.

    wanted: what the adapter adds; applied: how the stored weights differ from the base stored in the same dtype. still: entries that were to
    move and did not; entries: of all merged weights.
    """

    error: float
    still: int
    entries: int


@dataclass(frozen=True, eq=False)
class _Change:
    """One parameter of the base, and what the acting adapters and the side-car make of it.

    after: (some of its rows in float64, which of them) -> those rows merged, in a tensor of their own. turned: the rows are d_out's, which Conv1D has second.
    """

    path: str
    parameter: nn.Parameter
    after: Rows
    turned: bool = False


@dataclass(eq=False)
class _Tally:
    lost: float = 0.0
    wanted: float = 0.0
    still: int = 0
    entries: int = 0

    def count(self, before: torch.Tensor, wanted: torch.Tensor, stored: torch.Tensor) -> None:
        """Counts some rows: as they were, the float64 change that was wanted (spoilt here), as they are stored."""
        start = before.to(stored.dtype)
        self.wanted += float(wanted.square().sum())
        self.still += int(((stored == start) & (wanted != 0)).sum())
        self.lost += float(wanted.neg_().add_(stored.double()).sub_(start.double()).square_().sum())
        self.entries += stored.numel()

    def loss(self) -> CastLoss:
        error = (self.lost / self.wanted) ** 0.5 if self.wanted > 0 else 0.0
        return CastLoss(error=error, still=self.still, entries=self.entries)


@dataclass(eq=False)
class _Merged:
    """What merging put aside: each parameter with its tensor of before, and the layers that were marked as merged."""

    kept: list[tuple[nn.Parameter, torch.Tensor]] = field(default_factory=list)
    layers: list[Any] = field(default_factory=list)


_MERGED: "WeakKeyDictionary[PeftModel, _Merged]" = WeakKeyDictionary()


@torch.no_grad()
def merge(model: PeftModel, keep_on: torch.device | str | None = None) -> CastLoss:
    """Writes the active adapters and their side-car into the base's weights, in the base's dtype, and lets them act no more beside it.

    Sums are float64, cast once, some rows at a time. The tensors of before are kept as they are, on `keep_on` (None: where they lie), until unmerge puts them
    back. Saved modules act as they did. Raises UserError, with nothing changed, for a quantised base, a model that is merged already, a
    weight that is tied to the embedding, or a result that is not finite.
    """
    _check(model)
    merged, tally = _Merged(), _Tally()
    try:
        for change in _changes(model):
            before = change.parameter.data
            stored = _stored(change, before.dtype, tally)
            merged.kept.append((change.parameter, before if keep_on is None else before.to(keep_on)))
            change.parameter.data = stored
    except UserError as error:
        _put_back(merged)
        raise UserError(*(f"{fault}; nothing was changed" for fault in error.faults)) from error
    except BaseException:
        _put_back(merged)
        raise
    for _, layer in lora_layers(model):
        layer.merged_adapters = list(layer.active_adapters)
        merged.layers.append(layer)
    _MERGED[model] = merged
    return tally.loss()


def unmerge(model: PeftModel) -> None:
    """Puts the base's own tensors back, bit by bit, and lets adapters and side-car act again. Raises UserError for a model that merge did not merge."""
    if model not in _MERGED:
        raise UserError(
            "the model is not merged (or not by merge, which keeps what it overwrites): there is nothing to take back"
        )
    _put_back(_MERGED.pop(model))


def is_merged(model: PeftModel) -> bool:
    """Whether merge wrote adapters into this model's base, and unmerge has not taken them out."""
    return model in _MERGED


@torch.no_grad()
def merged_base(model: PeftModel, dtype: torch.dtype) -> tuple[PreTrainedModel, CastLoss]:
    """Gives the plain base with the active adapters, their side-car and saved modules in it, in `dtype`, and what the cast cost.

    Each weight is summed in float64 and cast once. The PeftModel is used up, and by a refusal of what is not finite too. Raises UserError as merge does.
    """
    _check(model)
    tally = _Tally()
    for change in _changes(model):
        change.parameter.data = _stored(change, dtype, tally)
    narrow_saved(model)
    plain: PreTrainedModel = model.unload().to(dtype)
    head, words = plain.get_output_embeddings(), plain.get_input_embeddings()
    if plain.config.tie_word_embeddings and head is not None and head.weight.data_ptr() != words.weight.data_ptr():
        plain.config.tie_word_embeddings = False  # a saved module took the place of one of the two
    return plain, tally.loss()


def _put_back(merged: _Merged) -> None:
    for parameter, before in merged.kept:
        parameter.data = before.to(parameter.device)
    for layer in merged.layers:
        layer.merged_adapters = []


def _stored(change: _Change, dtype: torch.dtype, tally: _Tally) -> torch.Tensor:
    before = change.parameter.data
    stored = torch.empty_like(before, dtype=dtype, memory_format=torch.contiguous_format)
    source, target = (before.T, stored.T) if change.turned else (before, stored)
    count = max(1, ENTRIES * len(source) // source.numel())
    for start in range(0, len(source), count):
        rows = slice(start, start + count)
        wide = source[rows].double()
        after = change.after(wide, rows)
        target[rows] = after
        if not bool(target[rows].isfinite().all()):
            raise UserError(
                f"{change.path}: merged it is not finite in {dtype}: the adapter is broken, or float16 too narrow for it"
            )
        tally.count(source[rows], after.sub_(wide), target[rows])
    return stored


def _check(model: PeftModel) -> None:
    """Raises UserError naming everything that stands against merging."""
    layers = lora_layers(model)
    if any(layer.merged for _, layer in layers):
        raise UserError("the model is merged already: unmerge it first")
    words = model.get_input_embeddings()
    tied = None if words is None else words.weight
    faults, bare = list[str](), dict[str, str]()
    for path, layer in layers:
        weight, kind = _target(layer), type(layer.get_base_layer()).__name__
        if (
            type(layer) not in (Linear, ParamWrapper)
            or type(weight) not in (nn.Parameter, torch.Tensor)
            or weight.dtype not in FLOATS
        ):
            faults.append(
                f"{path}: {kind} ({weight.dtype}) is no plain weight: an adapter is not merged into a quantised base; load the base in bfloat16 or float32"
            )
        elif weight is tied:
            faults.append(
                f"{path}: its weight is the embedding's too, which merging would change: leave it out of target_modules"
            )
        elif any(layer.lora_bias.get(name) for name in layer.active_adapters) and layer.get_base_layer().bias is None:
            bare[path] = kind
    if bare:
        faults.append(
            f"lora_bias=true, but {' and '.join(sorted(set(bare.values())))} has no bias to merge it into ({len(bare)} layers, first: {next(iter(bare))}): load the adapter beside its base, or train without lora_bias"
        )
    if faults:
        raise UserError(*faults)


def _target(layer: Any) -> nn.Parameter:
    found: nn.Parameter = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    return found


def _changes(model: PeftModel) -> Iterator[_Change]:
    for path, layer in lora_layers(model):
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        weight = _target(layer)
        if isinstance(layer, ParamWrapper):
            yield _Change(path, weight, partial(_experts, layer, active))
            continue
        beside = acting_factors(model, path)
        yield _Change(path, weight, partial(_linear, layer, active, beside), turned=bool(layer.fan_in_fan_out))
        biased = [name for name in active if layer.lora_bias.get(name)]
        if biased:
            yield _Change(f"{path}.bias", layer.get_base_layer().bias, partial(_bias, layer, biased))


def _linear(
    layer: Any, active: list[str], beside: tuple[torch.Tensor, torch.Tensor] | None, wide: torch.Tensor, rows: slice
) -> torch.Tensor:
    """Rows [., d_in] of W + sum s B A + side-car; DoRA's of W + s B A brought to their magnitudes (arXiv:2402.09353, eq. 5)."""
    after = wide.clone()
    for name in active:
        b, a = layer.lora_B[name].weight[rows].double(), layer.lora_A[name].weight.double()
        after.addmm_(b, a, alpha=float(layer.scaling[name]))
        if name in layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector[name].weight[rows].double()
            after *= (magnitude / torch.linalg.norm(after, dim=1))[:, None]
    if beside is not None:
        a, b = beside
        after.addmm_(b[rows].double(), a.double())
    return after


def _bias(layer: Any, active: list[str], wide: torch.Tensor, rows: slice) -> torch.Tensor:
    after = wide.clone()
    for name in active:
        after.add_(layer.lora_B[name].bias[rows].double(), alpha=float(layer.scaling[name]))
    return after


def _experts(layer: Any, active: list[str], wide: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some experts [., ., .] with s B A of each, or rows of a single matrix; see models.experts for how PEFT lays the factors out."""
    after = wide.clone()
    for name in active:
        scale = float(layer.scaling[name])
        a: torch.Tensor = layer.lora_A[name].weight.double()
        b: torch.Tensor = layer.lora_B[name].weight.double()
        if wide.dim() == 2:
            after.addmm_(b[rows], a, alpha=scale)
            continue
        a, b = a.view(layer.num_experts, -1, a.shape[1])[rows], b.view(b.shape[0], -1, layer.num_experts)[:, :, rows]
        for expert, one in enumerate(after):
            product = one if layer._did_swap_in_out_features else one.T
            product.addmm_(b[:, :, expert], a[expert], alpha=scale)
    return after
