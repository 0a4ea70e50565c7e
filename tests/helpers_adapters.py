"""LoRA factors made up for tests, and the dense matrices they stand for."""

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedunlearn.aggregation.reducers.base import mean_of
from fedunlearn.models.adapter_tensors import _apart, live_parameters
from fedunlearn.records.adapter import Tensors


def factors_like(tensors: Tensors, ranks: tuple[int, ...], seed: int = 5, size: float = 0.1) -> dict[str, torch.Tensor]:
    """Random factors for the same modules at other ranks: module by module the next of `ranks`, from the first again."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for number, name in enumerate(name for name in sorted(tensors) if ".lora_A." in name):
        rank, partner = ranks[number % len(ranks)], name.replace(".lora_A.", ".lora_B.")
        made[name] = size * torch.randn(rank, tensors[name].shape[1], generator=generator)
        made[partner] = size * torch.randn(tensors[partner].shape[0], rank, generator=generator)
    return made


def add_dense(base: PreTrainedModel, tensors: Tensors, scale: float = 1.0) -> PreTrainedModel:
    """Adds scale * B @ A into the base's own weights, in float64 before the cast."""
    modules = dict(base.named_modules())
    for name in (name for name in tensors if ".lora_A." in name):
        module = modules[name.split(".lora_A.")[0].removeprefix("base_model.model.")]
        dense = scale * tensors[name.replace(".lora_A.", ".lora_B.")].double() @ tensors[name].double()
        weight = module.weight.detach().double() + (dense.T if isinstance(module, Conv1D) else dense)
        module.weight = torch.nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
    return base


def apart(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((first - second).abs().max() / second.abs().max())


def add_dense_beneath(model: PeftModel, beside: Tensors) -> None:
    """Adds a side-car's product into the base layers of a model that is wrapped already."""
    for path, layer in model.named_modules():
        if f"{path}.lora_A.weight" in beside:
            product = beside[f"{path}.lora_B.weight"].double() @ beside[f"{path}.lora_A.weight"].double()
            weight = layer.base_layer.weight
            turned = product.T if weight.shape == product.T.shape and layer.fan_in_fan_out else product
            weight.data = (weight.data.double() + turned).to(weight.dtype)


def mean_of_clients(names, weights, read) -> dict[str, torch.Tensor]:
    """sum_k p_k x_k of every tensor, clients in id order, as the reducer of factors takes it. read: (client, name) -> tensor."""
    clients = sorted(weights)
    shares = tuple(weights[client] for client in clients)
    return {name: mean_of(tuple(read(client, name) for client in clients), shares) for name in names}


def live_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    """The gradients that the active adapter has, by the names of live_tensors; they share storage with the parameters' own."""
    found = {name: parameter.grad for name, parameter in live_parameters(model).items()}
    return _apart(model, {name: gradient for name, gradient in found.items() if gradient is not None})
