"""An adapter's tensors in and out of a model, under the names that they travel by."""

import warnings
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from fedunlearn.errors import UserError
from fedunlearn.models.base_biases import held_biases
from fedunlearn.models.experts import expert_views
from fedunlearn.records.adapter import Tensors

ACTIVE = "default"


def lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Gives every LoRA layer with its path, in the model's order; nested wrappers of fused experts one each."""
    return [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)]


def live_tensors(model: PeftModel, name: str = ACTIVE) -> dict[str, torch.Tensor]:
    """Gives an adapter's own tensors, in name order; they share storage with the model's parameters. Fused experts are views, a pair each.

    The base's biases that are trained act for one adapter at a time: those of another are what is held for it.
    """
    held = {} if name == ACTIVE else held_biases(model, name)
    return _apart(model, {**state_of(model, name), **held})


def live_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Gives the active adapter's trainable parameters by PEFT state-dict name, in name order; fused experts as one parameter."""
    trained = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.requires_grad}
    state = state_of(model, ACTIVE)
    return {name: trained[tensor.data_ptr()] for name, tensor in state.items() if tensor.data_ptr() in trained}


def read_tensors(model: PeftModel, name: str = ACTIVE) -> dict[str, torch.Tensor]:
    """Gives a copy on the CPU of an adapter's tensors, float32, contiguous, in name order."""
    live = live_tensors(model, name)
    return {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in live.items()}


def state_of(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """Gives an adapter's tensors by PEFT's state-dict names, in name order; fused experts as one. They share storage with the model's parameters."""
    with warnings.catch_warnings():
        if model.peft_config[name].lora_bias:  # a bias has one dimension, which PEFT takes for a factor's lost shard
            warnings.filterwarnings("ignore", "Adapter .* LoRA tensor.s. have invalid shape")
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: state[key] for key in sorted(state)}


def _apart(model: PeftModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gives each fused expert's own pair."""
    fused = {path: layer.num_experts for path, layer in model.named_modules() if isinstance(layer, ParamWrapper)}
    views = {key: view for name, tensor in tensors.items() for key, view in expert_views(name, tensor, fused).items()}
    return {key: views[key] for key in sorted(views)}


def write_tensors(model: PeftModel, tensors: Tensors, name: str = ACTIVE) -> None:
    """Copies values into the adapter in place. Raises UserError naming the first tensor whose name or shape does not fit."""
    live = live_tensors(model, name)
    odd = sorted(set(live) ^ set(tensors))
    if odd:
        side = (
            "the model has it, these tensors have not" if odd[0] in live else "these tensors have it, the model has not"
        )
        raise UserError(
            f"adapter does not fit this base: tensor {odd[0]!r} stands on one side only ({side}): other target_modules or modules_to_save, or another architecture"
        )
    for key, target in live.items():
        if target.shape != tensors[key].shape:
            raise UserError(
                f"adapter does not fit: {key!r} has shape {tuple(tensors[key].shape)}, this model wants {tuple(target.shape)} (another base or rank)"
            )
    with torch.no_grad():
        for key, target in live.items():
            target.copy_(tensors[key])
