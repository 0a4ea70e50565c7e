"""LoRA from Python: adapters on a base, trained, merged, switched. Each function does one thing and says what it refuses.

    from fedunlearn import lora
    model = lora.apply(base, "saves/unlearn/npo/adapter")     # a PeftModel, the adapter frozen and acting
    lora.merge(model); lora.unmerge(model)                    # the base is as it was, bit by bit
    lora.apply(model, other, name="style"); lora.switch(model, {"default": 1.0, "style": 0.5})

Nothing here needs a configuration or a federation. Between merge and unmerge PEFT's own set_adapter and disable_adapter are not to be called:
they would subtract, and the base would not come back.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fedunlearn.config.lora import LoraArgs
from fedunlearn.errors import UserError
from fedunlearn.models import merge as merging
from fedunlearn.models import switch as switching
from fedunlearn.models.adapter_files import load_adapter, save_adapter
from fedunlearn.models.adapter_tensors import ACTIVE, write_tensors
from fedunlearn.models.belongs import check_belongs
from fedunlearn.models.export import export
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.lora_config import lora_config_of
from fedunlearn.models.merge import CastLoss
from fedunlearn.models.rollback import rolled_back
from fedunlearn.models.soundness import check_sound
from fedunlearn.models.source import adapter_folder
from fedunlearn.records.adapter import Adapter, Tensors

__all__ = [
    "active", "adapter_of", "apply", "begin", "freeze", "is_merged", "load", "load_state_dict", "merge", "names", "remove", "save", "state_dict", "switch",
    "trainable_parameters", "unfreeze", "unmerge",
]  # fmt: skip


def begin(base: PreTrainedModel, args: LoraArgs, seed: int = 0) -> PeftModel:
    """Gives the base with a fresh trainable adapter `default`, which says what the base says, drawn from `seed` by args.init_lora_weights (null: A uniform, B zero).

    What pissa and olora take out of the base stands in a side-car: the base's tensors stay as they are. Raises UserError for a target that matches nothing,
    an initialisation that these layers cannot have, and AdaLoRA, whose ranks a run's server gives out; then, and after any other error, the base is as it was.
    """
    if args.adalora is not None:
        raise UserError(
            "peft_type=ADALORA: its ranks are given out by a run's server, round by round; set it to LORA, or train by src/fed_train.py"
        )
    config = lora_config_of(args, None, base.name_or_path, base)
    initial = True if args.init_lora_weights is None else args.init_lora_weights
    config.init_lora_weights = True  # what is saved must not have PEFT change the base
    with rolled_back(base):
        model = attach_lora(base, config)
        switching.hold_sidecar(model, ACTIVE, draw_fresh(model, seed, initial))
    return model


def load(folder: str | Path) -> Adapter:
    """Reads a PEFT folder, or a run's. Raises UserError for what is none, or is damaged."""
    place = adapter_folder(Path(folder).expanduser(), "folder")
    if place is None:
        raise UserError(f"folder={str(folder)!r} is a full model, no adapter: name a PEFT folder or a run's folder")
    return load_adapter(place)[0]


def apply(
    model: PreTrainedModel | PeftModel,
    adapter: Adapter | str | Path,
    name: str = ACTIVE,
    *,
    base_folder: str | Path | None = None,
    trust_base: bool = False,
) -> PeftModel:
    """Puts an adapter, frozen, onto a base, where it acts, or beside those that a base has already, where it waits for switch.

    base_folder: where the base was loaded from (None: its name_or_path); its fingerprint must be the adapter's, or its name where the adapter
    has no fingerprint. trust_base: the base is not looked at. Raises UserError, with the model as it was, for another base or what does not fit.
    """
    if isinstance(adapter, Adapter):
        check_sound(adapter, "given")
        given = adapter
    else:
        given = load(adapter)
    if not trust_base:
        check_belongs(given, Path(base_folder or _name_of(model)).expanduser())
    return switching.put_adapter(model, given, name)


def _name_of(model: PreTrainedModel | PeftModel) -> str:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return str(base.name_or_path)


def _check_adapted(model: torch.nn.Module) -> None:
    if not isinstance(model, PeftModel):
        raise UserError(f"there is no adapter on this {type(model).__name__}: lora.apply or lora.begin puts one on it")


def freeze(model: PeftModel) -> None:
    """Trains nothing any more."""
    model.requires_grad_(False)


def unfreeze(model: PeftModel) -> None:
    """Trains the acting adapters and nothing else. Raises UserError for a merged model: what is merged acts no more."""
    _check_adapted(model)
    if is_merged(model):
        raise UserError("the model is merged, so its adapters do not act: unmerge it before training")
    model.requires_grad_(False)
    for name in active(model):
        for parameter in switching.parameters_of(model, name).values():
            parameter.requires_grad_(True)


def trainable_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Gives what an optimiser is to step over, by its name in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_dict(model: PeftModel, name: str = ACTIVE) -> Tensors:
    """Gives a copy of an adapter's tensors on the CPU, under PEFT's names (fused experts a pair each)."""
    return adapter_of(model, name).tensors


def load_state_dict(model: PeftModel, tensors: Tensors, name: str = ACTIVE) -> None:
    """Writes such tensors into an adapter. Raises UserError naming the first whose name or shape does not fit; nothing is written then."""
    _check_adapted(model)
    if name not in model.peft_config:
        raise UserError(f"there is no adapter {name!r} on this base; there are {', '.join(model.peft_config)}")
    if is_merged(model):
        raise UserError("the model is merged: unmerge it before its adapters change")
    write_tensors(model, tensors, name)


def adapter_of(model: PeftModel, name: str = ACTIVE) -> Adapter:
    """Gives an adapter as it stands in the model: numbers, config, the base's fingerprint, side-car."""
    _check_adapted(model)
    return switching.origin_of(model, name)


def save(model: PeftModel, folder: str | Path, name: str = ACTIVE) -> None:
    """Writes an adapter as a PEFT folder that plain PEFT loads, with its hash and the base's fingerprint; what has a side-car as one adapter of both ranks.

    Raises UserError where the folder exists.
    """
    place = Path(folder).expanduser()
    if place.exists():
        raise UserError(f"folder={str(place)!r} is there already: name one that is to be made")
    found, base = adapter_of(model, name), Path(_name_of(model)).expanduser()
    if found.base_fingerprint is None and (base / "config.json").is_file():
        found = replace(found, base_fingerprint=fingerprint_base(base))
    whole, stacked = export(found, "exact")
    save_adapter(place, whole, stacked=stacked)


def merge(model: PeftModel, keep_on: torch.device | str | None = None) -> CastLoss:
    """Writes the acting adapters into the base, in its own dtype, and gives what the cast cost. keep_on: where the overwritten tensors lie ('cpu' spares a GPU's memory)."""
    _check_adapted(model)
    return merging.merge(model, keep_on)


def unmerge(model: PeftModel) -> None:
    """Gives the base back bit by bit; the adapters act beside it again."""
    merging.unmerge(model)


def is_merged(model: PeftModel) -> bool:
    """Whether merge wrote adapters into the base."""
    return merging.is_merged(model)


def switch(model: PeftModel, to: str | Mapping[str, float]) -> None:
    """Lets one adapter act by its name, or several by their weights: W + sum w_k s_k B_k A_k. All of them are frozen then; unfreeze to train."""
    _check_adapted(model)
    switching.switch_to(model, {to: 1.0} if isinstance(to, str) else to)


def active(model: PeftModel) -> Mapping[str, float]:
    """Gives the acting adapters and their weights."""
    _check_adapted(model)
    return switching.acting(model)


def names(model: PeftModel) -> tuple[str, ...]:
    """Gives all adapters on this base."""
    _check_adapted(model)
    return tuple(model.peft_config)


def remove(model: PeftModel, name: str) -> None:
    """Takes an adapter that does not act off the base, and frees its memory."""
    _check_adapted(model)
    switching.remove_adapter(model, name)
