"""Named adapters on one base: put there once, switched between, several active at once."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from fedunlearn.aggregation.factors import side_by_side
from fedunlearn.errors import UserError, did_you_mean
from fedunlearn.models.adapter_tensors import ACTIVE, lora_layers, read_tensors, state_of, write_tensors
from fedunlearn.models.lora_config import check_understood, plain_config
from fedunlearn.models.merge import is_merged
from fedunlearn.models.rollback import rolled_back
from fedunlearn.models.saved_modules import widen_saved
from fedunlearn.models.sidecar import held_sidecar, put_sidecar, use_sidecar
from fedunlearn.records.adapter import Adapter, B, Tensors

NAME = re.compile(r"[A-Za-z][\w-]*")
TAKEN = ("weight", "bias", "base_layer", "modules_to_save")
TOGETHER = "several together"
"""The side-car of several adapters at once; no adapter's name has a space."""


@dataclass(eq=False)
class _Held:
    """weights: of the adapters that act. origins: what each is, without its numbers."""

    weights: dict[str, float]
    origins: dict[str, Adapter] = field(default_factory=dict)


_HELD: "WeakKeyDictionary[PeftModel, _Held]" = WeakKeyDictionary()


def put_adapter(model: PreTrainedModel | PeftModel, adapter: Adapter, name: str = ACTIVE) -> PeftModel:
    """Puts an adapter under a name onto a base, or beside those that are there; the first one acts from now on, another when switched to.

    It is frozen, float32; a first one's model is in eval mode. Base, global random state and the other adapters stay as they are, trainable ones too.
    Raises UserError, with the model as it was, for a name that is taken, an adapter that is not understood, and tensors that do not fit.
    """
    first = not isinstance(model, PeftModel)
    _check_name(model, name)
    config = _config(adapter)
    if not first:
        _check_beside(model, config)
    known, training = set(model.modules()), model.training
    with rolled_back(model):
        made = _attached(model, config, name)
        widen_saved(made, name)
        write_tensors(made, adapter.tensors, name)
        put_sidecar(made, adapter.sidecar, name)
    held = _HELD.setdefault(made, _Held(dict.fromkeys(made.active_adapters, 1.0)))
    held.origins[name] = Adapter({}, adapter.peft_config, adapter.base_fingerprint)
    if first:
        switch_to(made, held.weights)
        made.eval()
        return made
    _switch_sidecars(made, held.weights)
    for module in set(made.modules()) - known:
        module.training = training
    return made


def hold_sidecar(model: PeftModel, name: str, sidecar: Tensors) -> None:
    """Gives an adapter that is there this side-car; empty: none. Raises UserError where it is not there, or the side-car does not fit."""
    _check_known(model, [name])
    put_sidecar(model, sidecar, name)
    _switch_sidecars(model, acting(model))


def remove_adapter(model: PeftModel, name: str) -> None:
    """Takes an adapter that does not act off the model. Raises UserError where it acts or is not there."""
    held = _held(model)
    _check_known(model, [name])
    if name in held.weights:
        raise UserError(f"adapter {name!r} acts: switch to another before it is removed")
    put_sidecar(model, {}, name)
    model.delete_adapter(name)
    held.origins.pop(name, None)


def switch_to(model: PeftModel, weights: Mapping[str, float]) -> None:
    """Lets these adapters act together, each times its weight, side-cars included; all of them frozen.

    Raises UserError for a merged model, a name that is not there, a weight that is not finite, and what is no sum: several of which one has
    magnitudes (DoRA), saved modules or trained biases, or one of those with a weight other than 1.
    """
    held = _held(model)
    if is_merged(model):
        raise UserError("the model is merged: unmerge it before switching")
    _check_known(model, weights)
    _check_sum(model, weights)
    model.base_model.set_adapter(list(weights), inference_mode=True)
    model.active_adapter = next(iter(weights))
    for _, layer in lora_layers(model):
        for name in layer.lora_A:
            layer.set_scale(name, weights.get(name, 1.0))
    _switch_sidecars(model, weights)
    held.weights = dict(weights)


def acting(model: PeftModel) -> Mapping[str, float]:
    """Gives the adapters that act, with their weights."""
    return dict(_held(model).weights)


def parameters_of(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """Gives an adapter's own parameters by PEFT's state-dict names; fused experts as one."""
    _check_known(model, [name])
    own = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    return {key: own[tensor.data_ptr()] for key, tensor in state_of(model, name).items()}


def origin_of(model: PeftModel, name: str) -> Adapter:
    """Gives an adapter as it stands in the model: a copy of its numbers, its config, base and side-car. Raises UserError where it is not there."""
    held = _held(model)
    _check_known(model, [name])
    known = held.origins.get(name) or Adapter({}, plain_config(model.peft_config[name]), None)
    sidecar = {key: tensor.cpu().clone() for key, tensor in held_sidecar(model, name).items()}
    return Adapter(read_tensors(model, name), known.peft_config, known.base_fingerprint, sidecar)


def _held(model: PeftModel) -> _Held:
    return _HELD.setdefault(model, _Held(dict.fromkeys(model.active_adapters, 1.0)))


def _check_name(model: nn.Module, name: str) -> None:
    if not NAME.fullmatch(name) or name in "lora_" or name.startswith("lora_") or name in TAKEN:
        raise UserError(
            f"adapter name {name!r}: letters, digits, _ and -, a letter first; none of {', '.join(TAKEN)}, no part of 'lora_' and nothing that begins so, for PEFT tells tensors by such words"
        )
    if isinstance(model, PeftModel) and name in model.peft_config:
        raise UserError(f"there is an adapter {name!r} on this base already: remove it first, or choose another name")
    if not isinstance(model, PeftModel) and hasattr(model, "peft_config"):
        raise UserError("the base has an adapter inside already: load the base anew")


def _config(adapter: Adapter) -> PeftConfig:
    """PEFT's config for layers whose values are written afterwards."""
    check_understood(adapter)
    try:
        config = PeftConfig.from_peft_type(**{**adapter.peft_config, "init_lora_weights": True, "inference_mode": True})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"adapter_config.json is not understood by this PEFT ({error}): save the adapter again with this version"
        ) from error
    config.lora_dropout = 0.0 if config.target_parameters else config.lora_dropout
    return config


def _check_beside(model: PeftModel, config: PeftConfig) -> None:
    if is_merged(model):
        raise UserError("the model is merged: unmerge it before another adapter comes onto it")
    for other in (config, *model.peft_config.values()):
        if other.bias != "none":
            raise UserError(
                f"bias={other.bias!r}: such an adapter changes the base's own biases, so no other can share its base: put it on one of its own"
            )


def _attached(model: PreTrainedModel | PeftModel, config: PeftConfig, name: str) -> PeftModel:
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not isinstance(model, PeftModel):
                made: PeftModel = get_peft_model(model, config, adapter_name=name)
                return made
            model.add_adapter(name, config)
            return model
    except (ValueError, KeyError, TypeError, re.error) as error:
        raise UserError(f"adapter {name!r} does not fit this base: {error}") from error


def _check_known(model: PeftModel, names: Mapping[str, float] | list[str]) -> None:
    if not names:
        raise UserError("no adapter is named: name one at least (PEFT's disable_adapter() gives the bare base)")
    for name in names:
        if name not in model.peft_config:
            raise UserError(
                f"there is no adapter {name!r} on this base{did_you_mean(name, model.peft_config)}; there are {', '.join(model.peft_config)}"
            )


def _check_sum(model: PeftModel, weights: Mapping[str, float]) -> None:
    faults = []
    for name, weight in weights.items():
        if not abs(weight) < float("inf"):  # NaN too
            faults.append(f"adapter {name!r}: weight {weight} is no finite number")
        config = model.peft_config[name]
        kinds = {"use_dora": config.use_dora, "modules_to_save": config.modules_to_save, "bias": config.bias != "none"}
        odd = [key for key, held in kinds.items() if held]
        if odd and (len(weights) > 1 or weight != 1.0):
            faults.append(
                f"adapter {name!r} has {odd[0]}={getattr(config, odd[0])!r}, which is no sum: let it act alone, with weight 1"
            )
    if faults:
        raise UserError(*faults)


def _switch_sidecars(model: PeftModel, weights: Mapping[str, float]) -> None:
    (first, weight), several = next(iter(weights.items())), len(weights) > 1
    together = {} if not several and weight == 1.0 else _together(model, weights)
    put_sidecar(model, together, TOGETHER)
    use_sidecar(model, TOGETHER if together else first)


def _together(model: PeftModel, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """The side-cars of several adapters as one, each times its weight."""
    blocks: dict[str, list[Tensors]] = {}
    for name, weight in weights.items():
        sidecar = held_sidecar(model, name)
        for key, tensor in sidecar.items():
            if key.endswith(B):
                a = key.removesuffix(B) + ".lora_A.weight"
                blocks.setdefault(key, []).append({a: sidecar[a], key: tensor * weight})
    return {key: tensor for parts in blocks.values() for key, tensor in side_by_side(parts).items()}
