"""The base in shards: each process holds its part of every layer, and one layer whole while it works on it.

FSDP2 (torch's fully_shard). What is trained is left out of it, the base's own biases with lora_config.bias among it: whole on each process, plain tensors.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from fedunlearn.models.adapter_tensors import ACTIVE
from fedunlearn.models.base_biases import keep_stored, stored_biases
from fedunlearn.models.hidden_states import decoder_blocks
from fedunlearn.models.lora import REFERENCE, add_reference, attach_lora
from fedunlearn.models.resident import Resident

WEIGHTS, MODEL, ADAPTER, TOKENIZER = "base.safetensors", "model", "adapter", "tokenizer"
BUFFER = "buffer/"


def save_parts(made: Resident, folder: Path) -> None:
    """Writes what the other processes build the same model from: the base's tensors as it is stored, its config, the adapter's config, the tokenizer."""
    model = made.model
    base = {name: p for name, p in model.named_parameters() if not _is_adapter(name)} | dict(stored_biases(model))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in base.items()}
    buffers = {BUFFER + name: buffer.detach().cpu().clone() for name, buffer in model.named_buffers()}
    safetensors.torch.save_file({**tensors, **buffers}, folder / WEIGHTS)
    config = copy.deepcopy(model.get_base_model().config)
    config.dtype = (
        model.dtype
    )  # it may be the file's still, and what stands beside a module of 16 bits is cast (saved_modules)
    config.save_pretrained(folder / MODEL)
    model.peft_config[ACTIVE].save_pretrained(str(folder / ADAPTER))
    made.chat.tokenizer.save_pretrained(folder / TOKENIZER)


def _is_adapter(name: str) -> bool:
    return f".{ACTIVE}." in f"{name}." or f".{REFERENCE}." in f"{name}."


def read_adapter_config(folder: Path) -> LoraConfig:
    """Gives PEFT's config of the adapter; its values are written afterwards, so that none is drawn."""
    config = PeftConfig.from_pretrained(str(folder / ADAPTER))
    config.init_lora_weights, config.inference_mode = False, False
    return config


def empty_model(folder: Path, attention: str) -> PeftModel:
    """Gives the model with the trainable adapter and the reference's beside it, all of it on the meta device: shapes without numbers."""
    config = AutoConfig.from_pretrained(folder / MODEL)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        model = attach_lora(base.requires_grad_(False), read_adapter_config(folder))
        add_reference(model)
    return model.eval()


def _remember_biases(model: PeftModel) -> None:
    """Tells what the base's trained biases are now that they have numbers."""
    keep_stored(model, {name: p for name, p in model.named_parameters() if p.requires_grad and not _is_adapter(name)})


def sharded_model(folder: Path, attention: str, device: torch.device) -> PeftModel:
    """Builds the model layer by layer, each read, sharded and let go before the next: at no time is there more than the shards and one layer.

    The group of processes is there already. The adapter's values are whatever was in memory: write them before use.
    """
    model = empty_model(folder, attention)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    paths = {module: path for path, module in model.named_modules()}
    for unit in _units(model):
        with safe_open(
            folder / WEIGHTS, framework="pt", device=str(device)
        ) as file:  # a file that is closed is not in memory any more
            _fill(unit, paths[unit], file, device)
            whole = {p for name, p in unit.named_parameters(paths[unit]) if _is_adapter(name) or p.requires_grad}
            fully_shard(unit, mesh=mesh, ignored_params=whole)
    _remember_biases(model)
    return model


def whole_model(folder: Path, attention: str, device: torch.device) -> PeftModel:
    """Builds the same model whole on the device."""
    model = empty_model(folder, attention)
    with safe_open(folder / WEIGHTS, framework="pt", device=str(device)) as file:
        _fill(model, "", file, device)
    _remember_biases(model)
    return model


def _units(model: PeftModel) -> Iterable[nn.Module]:
    """What is gathered at once, from the inside out: every decoder block, embedding and head where each has its own weight, then what is left."""
    yield from decoder_blocks(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = {id(p) for p in head.parameters()}
    if not any(id(p) in own for p in embedding.parameters()):
        yield from (embedding, head)
    yield model


def _fill(unit: nn.Module, path: str, file: Any, device: torch.device) -> None:
    """Gives every tensor below the unit that is without numbers its own; a tied one stays one."""
    stored = set(file.keys())
    places: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = {}
    for below, module in unit.named_modules(prefix=path):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.device.type == "meta":
                places.setdefault(parameter, []).append((module, leaf, f"{below}.{leaf}".lstrip(".")))
        for leaf, buffer in module.named_buffers(recurse=False):
            if buffer.device.type == "meta":
                value = file.get_tensor(f"{BUFFER}{below}.{leaf}".replace("/.", "/")).clone()  # no view of the file
                module.register_buffer(leaf, value, persistent=leaf not in module._non_persistent_buffers_set)
    for parameter, homes in places.items():
        name = next((name for _, _, name in homes if name in stored), "")
        made = _made(parameter, name, homes[0][2], file, device)
        for module, leaf, _ in homes:
            module.register_parameter(leaf, made)


def _made(parameter: nn.Parameter, name: str, shown: str, file: Any, device: torch.device) -> nn.Parameter:
    if not name:
        if not _is_adapter(shown):
            raise ValueError(f"the base has no tensor {shown!r}")
        empty = torch.zeros(parameter.shape, dtype=torch.float32, device=device)
        return nn.Parameter(empty, requires_grad=parameter.requires_grad)
    value = file.get_tensor(name)
    if value.shape != parameter.shape:
        raise ValueError(
            f"the base's tensor {name!r} has shape {tuple(value.shape)} instead of {tuple(parameter.shape)}"
        )
    trained = parameter.requires_grad
    return nn.Parameter(value.clone() if trained else value, requires_grad=trained)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one process holds of the model, in bytes. shards: of the base; whole: parameters that are not in shards (the adapters, and biases that are trained); largest: of one unit, gathered."""

    shards: int
    whole: int
    largest: int


def held_by(model: PeftModel) -> Held:
    """Measures this process's part of a sharded model."""
    seen: set[nn.Parameter] = set()
    sizes = []
    for unit in _units(model):
        own = {p for p in unit.parameters() if isinstance(p, DTensor)} - seen
        sizes.append(sum(p.numel() * p.element_size() for p in own))
        seen |= own
    return Held(
        shards=sum(p.numel() * p.element_size() for p in map(_local, seen)),
        whole=sum(p.numel() * p.element_size() for p in model.parameters() if not isinstance(p, DTensor)),
        largest=max(sizes),
    )


def _local(parameter: nn.Parameter) -> torch.Tensor:
    assert isinstance(parameter, DTensor)
    local: torch.Tensor = parameter.to_local()
    return local
