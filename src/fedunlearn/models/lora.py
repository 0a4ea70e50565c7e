"""LoRA on the resident base: attached once, its tensors swapped in and out."""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedunlearn.aggregation.factors import fresh_a
from fedunlearn.config.model import LoraArgs
from fedunlearn.errors import UserError
from fedunlearn.models.sidecar import put_sidecar, use_sidecar
from fedunlearn.records.adapter import Adapter, Tensors, Weights
from fedunlearn.records.rounds import Trained
from fedunlearn.seeds import seed_of

ACTIVE = "default"
REFERENCE = "reference"
LINEAR = (nn.Linear, Conv1D)
PLAIN: Mapping[str, tuple[object, ...]] = {
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}
"""Values of a PEFT config that leave an adapter plain LoRA over an untouched base: other initialisations rewrite the base's weights."""


def lora_config_of(args: LoraArgs, loaded: Adapter | None, base_name: str) -> LoraConfig:
    """Gives PEFT's config: the loaded adapter's with this run's dropout, else the yaml's.

    Raises UserError where the yaml's r, alpha, targets or variant differ from the loaded adapter's, or are null without one.
    """
    if loaded is None:
        missing = [key for key in ("r", "lora_alpha", "target_modules") if getattr(args, key) is None]
        if missing:
            raise UserError(
                *(
                    f"model.model_args.lora_config.{key}=null without an adapter to take it from: give a value"
                    for key in missing
                )
            )
        targets = args.target_modules if isinstance(args.target_modules, str) else list(args.target_modules or ())
        config = LoraConfig(
            r=args.r,
            lora_alpha=args.lora_alpha,
            target_modules=targets,
            use_rslora=bool(args.use_rslora),
            bias=args.bias,
            task_type=args.task_type,
        )
    else:
        check_agreement(args, loaded.peft_config)
        config = PeftConfig.from_peft_type(**dict(loaded.peft_config))
    config.base_model_name_or_path = base_name
    config.lora_dropout = args.lora_dropout
    config.inference_mode = False
    return config


def check_agreement(args: LoraArgs, peft_config: Mapping[str, object]) -> None:
    """Raises UserError naming every value of the yaml that is not the loaded adapter's (null agrees with all)."""
    if peft_config.get("peft_type") != "LORA":
        raise UserError(
            f"the adapter's peft_type={peft_config.get('peft_type')!r} is not LORA: only LoRA adapters are understood"
        )
    faults = [
        f"the adapter's {key}={peft_config[key]!r} is a variant that is not understood here: allowed is {plain}"
        for key, plain in PLAIN.items()
        if peft_config.get(key) not in (None, False, *plain)
    ]
    for key in ("r", "lora_alpha", "use_rslora", "target_modules"):
        wanted, loaded = getattr(args, key), peft_config.get(key)
        if wanted is not None and _comparable(wanted) != _comparable(loaded):
            faults.append(
                f"model.model_args.lora_config.{key}={wanted!r} differs from the loaded adapter's {loaded!r}: set that value or null"
            )
    if faults:
        raise UserError(*faults)


def _comparable(value: object) -> object:
    return sorted(map(str, value)) if isinstance(value, list | tuple | set) else value


def attach_lora(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wraps a base without adapter in PeftModel, once; its values are drawn by draw_fresh or written by write_tensors.

    Adapters are float32 whatever the base is. Raises UserError for a target that matches no module, ValueError where the base
    has an adapter already.
    """
    if hasattr(base, "peft_config"):
        raise ValueError("the base has an adapter already: a second wrap would train a new adapter over the old")
    _check_targets(base, config.target_modules)
    config = copy.copy(config)
    config.base_model_name_or_path = base.name_or_path  # PEFT's own opinion; what is saved is the name of the source
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
        model: PeftModel = get_peft_model(base, config)
    check_trainable(model)
    model.eval()
    return model


def draw_fresh(model: PeftModel, seed: int) -> None:
    """Gives the active adapter fresh values: A uniform in +-1/sqrt(d_in), as PEFT draws it, B zero.

    Drawn on the CPU from a generator of its own, so that device and global random state do not matter. Raises ValueError for
    a tensor that is neither A nor B.
    """
    generator = torch.Generator().manual_seed(seed_of("lora init", seed))
    with torch.no_grad():
        for name, parameter in live_parameters(model).items():
            if ".lora_A." in name:
                parameter.copy_(fresh_a(parameter.shape, generator))
            elif ".lora_B." in name:
                parameter.zero_()
            else:
                raise ValueError(f"adapter tensor {name!r} is neither A nor B")


def _check_targets(base: nn.Module, targets: object) -> None:
    """Raises UserError for a target that matches nothing, or something that is no linear layer."""
    if targets == "all-linear":
        return
    at = "model.model_args.lora_config.target_modules"
    leaves = {name: module for name, module in base.named_modules() if not list(module.children())}
    known = ", ".join(
        sorted({name.rsplit(".", 1)[-1] for name, module in leaves.items() if isinstance(module, LINEAR)})
    )
    faults = []
    for target in [targets] if isinstance(targets, str) else sorted(targets):  # type: ignore[call-overload]
        found = [module for name, module in leaves.items() if _matches(name, target, isinstance(targets, str))]
        if not found:
            faults.append(f"{at}: {target!r} matches no module of this base; linear ones are {known}")
        elif not all(isinstance(module, LINEAR) for module in found):
            faults.append(
                f"{at}: {target!r} matches {type(found[0]).__name__}, which is no linear layer; linear ones are {known}"
            )
    if faults:
        raise UserError(*faults)


def _matches(name: str, target: str, pattern: bool) -> bool:
    """PEFT's rule: a text is a pattern for the whole name, an entry of a list is a name or its end."""
    if not pattern:
        return name == target or name.endswith(f".{target}")
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise UserError(
            f"model.model_args.lora_config.target_modules={target!r} is no regular expression ({error})"
        ) from error


def check_trainable(model: PeftModel) -> None:
    """Asserts our own invariant: the trainable parameters are exactly the active adapter's."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {name for name, _ in model.named_parameters() if f".{ACTIVE}." in name}
    assert trainable == wanted, sorted(trainable ^ wanted)[:3]
    assert trainable, "no trainable adapter parameter"


def live_tensors(model: PeftModel, name: str = ACTIVE) -> dict[str, torch.Tensor]:
    """Gives the adapter's own tensors by PEFT state-dict name, in name order; they share storage with the model's parameters."""
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: state[key] for key in sorted(state)}


def live_parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """Gives the active adapter's trainable parameters by PEFT state-dict name, in name order."""
    found = {
        name.replace(f".{ACTIVE}.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {name: found[name] for name in sorted(found)}


def read_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Gives a copy on the CPU of the active adapter's tensors, float32, in name order."""
    return {key: tensor.detach().cpu().clone() for key, tensor in live_tensors(model).items()}


def write_tensors(model: PeftModel, tensors: Tensors, name: str = ACTIVE) -> None:
    """Copies values into the adapter in place. Raises UserError naming the first tensor whose name or shape does not fit."""
    live = live_tensors(model, name)
    odd = sorted(set(live) ^ set(tensors))
    if odd:
        raise UserError(
            f"adapter does not fit this base: tensor {odd[0]!r} stands on one side only (other target modules, or another architecture)"
        )
    for key, target in live.items():
        if target.shape != tensors[key].shape:
            raise UserError(
                f"adapter does not fit: {key!r} has shape {tuple(tensors[key].shape)}, this model wants {tuple(target.shape)} (another base or rank)"
            )
    with torch.no_grad():
        for key, target in live.items():
            target.copy_(tensors[key])


def hold_reference(model: PeftModel, weights: Weights) -> None:
    """Puts a frozen second adapter with these values on the one base (made on first use); the active adapter stays as it is."""
    if REFERENCE not in model.peft_config:
        config = PeftConfig.from_peft_type(**model.peft_config[ACTIVE].to_dict())
        with torch.random.fork_rng():
            model.add_adapter(REFERENCE, config)
        model.set_adapter(ACTIVE)
    write_tensors(model, weights.factors, REFERENCE)
    put_sidecar(model, weights.sidecar, REFERENCE)
    check_trainable(model)


@contextmanager
def reference_active(model: PeftModel) -> Iterator[None]:
    """Inside the block the frozen reference adapter acts, in eval mode and without gradients; afterwards the trainable one again.

    What was frozen of the trainable one (a mask) is frozen afterwards too, which PEFT's set_adapter alone would undo.
    """
    training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.set_adapter(REFERENCE, inference_mode=True)
    use_sidecar(model, REFERENCE)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_adapter(ACTIVE)
        use_sidecar(model, ACTIVE)
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)
        model.train(training)


@contextmanager
def training_only(model: PeftModel, trained: Trained) -> Iterator[None]:
    """Inside the block only these factors of the active adapter have gradients; afterwards both again."""
    check_trainable(model)
    frozen = [p for name, p in live_parameters(model).items() if not trained.covers(name)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def plain_config(config: LoraConfig) -> dict[str, object]:
    """Gives PEFT's config as plain JSON values with sorted lists: the same text in every process."""
    return {key: _plain(value) for key, value in sorted(config.to_dict().items())}


def _plain(value: object) -> object:
    if isinstance(value, set | frozenset | list | tuple):
        items = [_plain(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return getattr(value, "value", value)
    return str(value)
