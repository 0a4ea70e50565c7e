"""How many parameters a base has and how many an adapter adds, counted on meta tensors: no weight is read."""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from fedunlearn.aggregation.factors import modules_of, plain_of, scales_of
from fedunlearn.config.lora import LoraArgs
from fedunlearn.errors import UserError, did_you_mean
from fedunlearn.files import read_object
from fedunlearn.models.adapter_tensors import ACTIVE, live_tensors
from fedunlearn.models.layers import LINEAR, sides_of
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.lora_config import lora_config_of, plain_config
from fedunlearn.records.adapter import Adapter, Tensors

LAYER = re.compile(r"\.\d+(?=\.|$)")


@dataclass(frozen=True, kw_only=True)
class ModuleCount:
    """One module, or all of one kind (layers and experts numbered `*`). shape: what it maps, (d_out, d_in); None of a base's module. rank, scale: of its factors.

    parameters: of one of them; count: how many there are.
    """

    name: str
    parameters: int
    shape: tuple[int, ...] | None = None
    rank: int | None = None
    scale: float | None = None
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class Summary:
    """total: parameters of the base without the adapter, tied ones once. trainable: those of the adapter (0 without one); frozen: those of the base that stay.

    modules: the adapter's, or without one the base's. base_bytes: the base in its config's dtype; adapter_bytes: the adapter in float32.
    file_bytes: what lies on the disk of what was named, None for a config alone.
    """

    base: str
    total: int
    trainable: int
    frozen: int
    modules: tuple[ModuleCount, ...]
    base_bytes: int
    adapter_bytes: int
    file_bytes: int | None = None


def read_config(path: Path) -> PretrainedConfig:
    """Reads a model's config.json, or that of its folder. Raises UserError where it is none that transformers knows."""
    file = path / "config.json" if path.is_dir() else path
    try:
        known = read_object(file)
        kind = known.pop("model_type")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"model_type={str(kind)[:80]!r} is unknown to this transformers")
        return AutoConfig.for_model(kind, **known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{str(file)!r} is no config.json of a model ({type(error).__name__}: {error}): name a model's folder or its config.json"
        ) from error


def summarise_base(base: PreTrainedModel, name: str) -> Summary:
    """Counts a base by itself, module by module."""
    total = _number(base.parameters())
    modules = [
        ModuleCount(name=path, parameters=_number(module.parameters(recurse=False)))
        for path, module in base.named_modules()
        if list(module.parameters(recurse=False))
    ]
    return Summary(
        base=name,
        total=total,
        trainable=0,
        frozen=total,
        modules=_without_tied(base, modules),
        base_bytes=_bytes(base),
        adapter_bytes=0,
    )


def summarise_fresh(base: PreTrainedModel, args: LoraArgs, name: str) -> Summary:
    """Counts the adapter that a run with these arguments would train. Raises UserError for targets that match nothing. The base is wrapped by it."""
    total, size = _number(base.parameters()), _bytes(base)
    own = list(base.parameters())
    model, config = _wrapped(base, args, name)
    tensors = live_tensors(model)
    frozen = _number(parameter for parameter in own if not parameter.requires_grad)
    return _of_adapter(tensors, config, name, total, frozen, size)


def summarise_adapter(adapter: Adapter, base: PreTrainedModel, name: str) -> Summary:
    """Counts an adapter's own tensors beside its base. Raises UserError where a module is not the base's, or has other sides there."""
    known = dict(base.named_modules())
    paths = [module.name for module in modules_of(adapter.tensors)]
    bare = {path: re.sub(r"(\.base_layer)?(\.\d+)?$", "", path) for path in paths}
    for path in paths:
        if path not in known and bare[path] not in known:
            raise UserError(
                f"the adapter's module {path!r} is none of {name!r}{did_you_mean(path, known)}: name the base it was trained on (--base)"
            )
    _check_sides(adapter, known, name)
    total, values = _number(base.parameters()), dict(base.named_parameters())
    trained = [key for key in plain_of(adapter.tensors) if _of_base(key) in values]
    frozen = total - sum(adapter.tensors[key].numel() for key in trained if key.endswith(".bias"))
    return _of_adapter(adapter.tensors, adapter.peft_config, name, total, frozen, _bytes(base))


def _check_sides(adapter: Adapter, known: Mapping[str, nn.Module], name: str) -> None:
    for module in modules_of(adapter.tensors):
        layer = known.get(module.name)
        if not isinstance(layer, LINEAR):
            continue  # an expert: its sides are its parameter's
        sides = (int(adapter.tensors[module.a].shape[1]), int(adapter.tensors[module.b].shape[0]))
        if sides != sides_of(layer):
            raise UserError(
                f"the adapter's module {module.name!r} maps {sides[0]} to {sides[1]}, and that of {name!r} {' to '.join(map(str, sides_of(layer)))}: "
                "name the base it was trained on (--base)"
            )


def by_kind(modules: Iterable[ModuleCount]) -> tuple[ModuleCount, ...]:
    """Gives modules that differ in their layer's or expert's number alone as one, with their count."""
    kinds: dict[tuple[object, ...], list[ModuleCount]] = {}
    for one in modules:
        name = LAYER.sub(".*", one.name)
        kinds.setdefault((name, one.shape, one.rank, one.scale, one.parameters), []).append(one)
    return tuple(
        ModuleCount(
            name=str(key[0]),
            parameters=ones[0].parameters,
            shape=ones[0].shape,
            rank=ones[0].rank,
            scale=ones[0].scale,
            count=len(ones),
        )
        for key, ones in kinds.items()
    )


def files_bytes(folder: Path) -> int:
    """Gives the size of the weights that lie in a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _wrapped(base: PreTrainedModel, args: LoraArgs, name: str) -> tuple[PeftModel, Mapping[str, object]]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = attach_lora(base, lora_config_of(args, None, name))
        except (ValueError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"PEFT builds no adapter of these arguments on {name!r}: {error}") from error
    return model, plain_config(model.peft_config[ACTIVE])


def _of_adapter(
    tensors: Tensors, config: Mapping[str, object], name: str, total: int, frozen: int, size: int
) -> Summary:
    scales = scales_of(config, tensors)
    modules = [
        ModuleCount(
            name=m.name,
            parameters=tensors[m.a].numel() + tensors[m.b].numel(),
            shape=(int(tensors[m.b].shape[0]), int(tensors[m.a].shape[1])),
            rank=int(tensors[m.a].shape[0]),
            scale=scales[m.name],
        )
        for m in modules_of(tensors)
    ]
    modules += [
        ModuleCount(name=_of_base(key), parameters=tensors[key].numel(), shape=tuple(tensors[key].shape))
        for key in plain_of(tensors)
    ]
    trainable = sum(tensor.numel() for tensor in tensors.values())
    return Summary(
        base=name,
        total=total,
        trainable=trainable,
        frozen=frozen,
        modules=tuple(modules),
        base_bytes=size,
        adapter_bytes=4 * trainable,
    )


def _of_base(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _number(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in parameters}.values())


def _bytes(base: PreTrainedModel) -> int:
    dtype = getattr(base.config, "dtype", None)
    each = (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize
    return _number(base.parameters()) * each


def _without_tied(base: PreTrainedModel, modules: list[ModuleCount]) -> tuple[ModuleCount, ...]:
    """Leaves out a head whose weight is the embedding's."""
    head, words = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or words is None or head.weight is not words.weight:
        return tuple(modules)
    path = next(path for path, module in base.named_modules() if module is head)
    return tuple(one for one in modules if one.name != path)
