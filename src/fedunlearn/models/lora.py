"""LoRA on the resident base: attached once, its tensors swapped in and out."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from transformers import PreTrainedModel

from fedunlearn.errors import UserError
from fedunlearn.models.adalora import freeze_ranks, is_adalora
from fedunlearn.models.adapter_tensors import ACTIVE, live_parameters, write_tensors
from fedunlearn.models.base_biases import biases_of, keep_stored, stored_biases
from fedunlearn.models.lora_rules import check_on_base, rank_of, warn_of_ranks
from fedunlearn.models.rollback import rolled_back
from fedunlearn.models.saved_modules import check_saved, saved_modules, widen_saved
from fedunlearn.models.sidecar import put_sidecar, use_sidecar
from fedunlearn.models.targets import Targets, find_targets, with_targets
from fedunlearn.records.adapter import Weights
from fedunlearn.records.rounds import Trained

REFERENCE = "reference"


def attach_lora(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wraps a base without adapter in PeftModel, once; its values are drawn by initial.draw_fresh or written by write_tensors.

    Adapters are float32 whatever the base is. Raises UserError for targets that the base does not have or cannot give an adapter, for saved modules that
    match nothing, and for biases that cannot be trained, with the base as it was; ValueError where the base has an adapter already. A rank above the smaller side of a matrix is said aloud.
    """
    if hasattr(base, "peft_config"):
        raise ValueError("the base has an adapter already: a second wrap would train a new adapter over the old")
    found = find_targets(base, config)
    config = with_targets(config, found)
    check_on_base(config, found)
    warn_of_ranks(base, config, found)
    config.base_model_name_or_path = base.name_or_path  # PEFT's own opinion; what is saved is the name of the source
    with rolled_back(base):
        model = _wrapped(base, config)
        freeze_ranks(model)
        check_built(model, config, found)
        check_saved(model, config.modules_to_save)
        widen_saved(model, ACTIVE)
        _keep_biases(model, config.bias)
        check_trainable(model)
        model.eval()
    return model


def _wrapped(base: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an older name
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed")  # merging is ours
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True` and")  # a line of ours says it
        model: PeftModel = get_peft_model(base, _drawn_later(config))
    model.peft_config[ACTIVE].init_lora_weights = config.init_lora_weights
    return model


def _keep_biases(model: PeftModel, asked: str) -> None:
    """Remembers the base's biases that are trained. Raises UserError where there are none to train, or none that can be."""
    if asked == "none":
        return
    own = {name: p for name, p in model.named_parameters() if p.requires_grad and f".{ACTIVE}." not in name}
    at = f"model.model_args.lora_config.bias={asked!r}"
    saved = (path for path, module in saved_modules(model) if any(k.endswith("bias") for k in module.state_dict()))
    beside = [path.removeprefix("base_model.model.") for path in saved if asked == "all"]
    faults = [
        (bool(own), f"{at}: this base has no bias there, nothing more would be trained; set it to none"),
        (
            not beside,
            f"{at} beside modules_to_save={beside}, whose bias is trained with it: set bias=lora_only, or leave that module out",
        ),
        (
            all(parameter.dtype == torch.float32 for parameter in own.values()),
            f"{at} on a base in {model.dtype}: the base's own biases are trained, and steps of a usual learning rate are lost in its 8 bits; set torch_dtype=float32, or bias=none",
        ),
    ]
    if not all(holds for holds, _ in faults):
        raise UserError(*(fault for holds, fault in faults if not holds))
    keep_stored(model, own)


def _drawn_later(config: LoraConfig) -> LoraConfig:
    """A copy under which PEFT leaves the base's weights alone: some of its initialisations write into them."""
    plain = copy.copy(config)
    plain.init_lora_weights = True
    return plain


def check_built(model: PeftModel, config: LoraConfig, found: Targets) -> None:
    """Asserts our own invariant: exactly the targets have factors, each of the rank that the config says."""
    built: dict[str, tuple[int, int]] = {}
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            parameter = isinstance(layer, ParamWrapper)
            name = f"{path}.{layer.parameter_name}".replace(".base_layer", "") if parameter else path
            factor = layer.lora_A[ACTIVE]
            built[name] = (len(getattr(factor, "weight", factor)), layer.num_experts if parameter else 1)
    assert set(built) == found.modules | found.experts, sorted(set(built) ^ (found.modules | found.experts))[:3]
    odd = {name: rows for name, (rows, experts) in built.items() if rows != experts * rank_of(config, name)}
    assert not odd, odd


def check_trainable(model: PeftModel) -> None:
    """Asserts our own invariant: the trainable parameters are exactly the active adapter's, the biases of the base that it trains among them."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {name for name, _ in model.named_parameters() if f".{ACTIVE}." in f"{name}." and ".ranknum." not in name}
    wanted = own | stored_biases(model).keys()
    assert trainable == wanted, sorted(trainable ^ wanted)[:3]
    assert trainable, "no trainable adapter parameter"


def hold_reference(model: PeftModel, weights: Weights) -> None:
    """Puts a frozen second adapter with these values on the one base (made on first use); the active adapter stays as it is."""
    add_reference(model)
    write_tensors(model, weights.factors, REFERENCE)
    put_sidecar(model, weights.sidecar, REFERENCE)
    check_trainable(model)


def add_reference(model: PeftModel) -> None:
    """Makes room for the reference's values beside the active adapter, of the same form, where there is none yet."""
    if REFERENCE in model.peft_config:
        return
    known = {**model.peft_config[ACTIVE].to_dict(), "bias": "none"}
    if is_adalora(model.peft_config[ACTIVE]):
        known["inference_mode"] = True  # PEFT trains one AdaLoRA adapter of a model at most
    config = _drawn_later(PeftConfig.from_peft_type(**known))
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed")
        model.add_adapter(REFERENCE, config)
    freeze_ranks(model)
    widen_saved(model, REFERENCE)
    model.set_adapter(ACTIVE)


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
        with torch.no_grad(), biases_of(model, REFERENCE):
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
