"""PEFT's config of the yaml's `lora_config` and of a loaded adapter, and where the two disagree."""

from collections.abc import Mapping

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel

from fedunlearn.config.lora import AT, OF_ADALORA, REFUSED, LoraArgs, given
from fedunlearn.errors import UserError
from fedunlearn.models.adalora import adalora_config
from fedunlearn.models.lora_rules import check_on_base, settle_dropout, settle_targets
from fedunlearn.models.soundness import fault_of_kind
from fedunlearn.models.targets import Targets, find_targets, with_targets
from fedunlearn.records.adapter import Adapter

ADAPTERS = "the adapter's "
INITIAL = (None, True, False, "gaussian", "orthogonal")
"""Initialisations that leave the base as it is stored: with another, a foreign adapter belongs to weights that nobody has."""
CHANGES_THE_FORWARD = (
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "megatron_config",
)
"""Of the keys that are refused, those without which a loaded adapter would be another one."""
FILTERS = ("exclude_modules", "layers_to_transform", "layers_pattern")
WHERE = ("target_modules", *FILTERS, "target_parameters")
WHAT = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "bias",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
)
"""The keys of lora_config that a loaded adapter answers: where its factors are (judged by what the names mean), and what they are."""


def lora_config_of(
    args: LoraArgs, loaded: Adapter | None, base_name: str, base: PreTrainedModel | None = None
) -> LoraConfig:
    """Gives PEFT's config: the loaded adapter's with this run's dropout, else the yaml's.

    base: the model (its weights may be on the meta device) on which names like `attention` are put as PEFT understands them and
    rules of the base are kept; without one names stand as they are written, and attach_lora does it. Raises UserError where a value
    of the yaml differs from the loaded adapter's, or is null without one, or does not suit the base.
    """
    missing = [key for key in ("r", "lora_alpha", "target_modules") if getattr(args, key) is None]
    if args.adalora is not None:
        _check_fresh(loaded)
        missing.remove("r")
    if missing and loaded is None:
        raise UserError(*(f"{AT}{key}=null without an adapter to take it from: give a value" for key in missing))
    config = _of_yaml(args, base) if loaded is None else _of_loaded(args, loaded, base)
    config.base_model_name_or_path = base_name
    config.lora_dropout = args.lora_dropout
    config.inference_mode = False
    if base is None:
        return config
    at = AT if loaded is None else ADAPTERS
    found = find_targets(base, config, at)
    config = with_targets(config, found)
    settle_dropout(config, found, args)
    check_on_base(config, found, at)
    _check_orientation(args, found)
    return config


def _of_yaml(args: LoraArgs, base: PreTrainedModel | None) -> LoraConfig:
    values = given(args)
    targets = values.pop("target_modules", None)
    config = LoraConfig(**values) if args.adalora is None else adalora_config(values, args.adalora)
    config.target_modules = (
        set(targets) if isinstance(targets, list) else targets
    )  # a text beside layers: PEFT refuses it before it is names
    if base is not None:
        settle_targets(config, base, args)
    return config


def _of_loaded(args: LoraArgs, loaded: Adapter, base: PreTrainedModel | None) -> LoraConfig:
    check_agreement(args, loaded, base)
    return _peft_config(loaded.peft_config)


def _check_fresh(loaded: Adapter | None) -> None:
    """Raises UserError for an adapter beneath AdaLoRA."""
    if loaded is not None:
        raise UserError(
            f"{AT}peft_type=ADALORA beside an adapter that is loaded: AdaLoRA gives out the ranks of a fresh adapter, and a loaded one has its own (an AdaLoRA run's "
            f"result is plain LoRA); set peft_type=LORA, with {', '.join(OF_ADALORA)} left out and r=null, or name a base"
        )


def check_understood(adapter: Adapter) -> None:
    """Raises UserError for an adapter that is no LoRA, does more in a forward pass than B A, or belongs on weights that nobody has.

    An adapter that carries its base's fingerprint is ours, and ours leave the base as it is whatever they began with.
    """
    peft_config = adapter.peft_config
    kind = fault_of_kind(peft_config)
    if kind:
        raise UserError(f"the adapter's {kind}")
    faults = [
        f"the adapter's {key}={peft_config[key]!r} is a variant that is not understood here: {REFUSED[key].split(':')[0]}"
        for key in CHANGES_THE_FORWARD
        if peft_config.get(key)
    ]
    initial = peft_config.get("init_lora_weights")
    if adapter.base_fingerprint is None and initial not in INITIAL:
        faults.append(
            f"the adapter's init_lora_weights={initial!r} changed its base's weights, and the folder does not say into what: "
            "export it as plain LoRA (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if faults:
        raise UserError(*faults)


def check_agreement(args: LoraArgs, adapter: Adapter, base: PreTrainedModel | None = None) -> None:
    """Raises UserError for an adapter that is not understood, or naming every value of the yaml that is not the loaded adapter's (null agrees with all).

    base: with it two ways of naming the same modules agree; without it the words themselves are compared.
    """
    check_understood(adapter)
    peft_config = adapter.peft_config
    differing = [key for key in WHAT if _differ(getattr(args, key), peft_config.get(key))]
    by_words = base is None or args.target_modules is None
    if by_words or not _same_places(args, peft_config, base):
        differing += [key for key in WHERE if _differ(getattr(args, key), peft_config.get(key))]
    faults = [
        f"{AT}{key}={getattr(args, key)!r} differs from the loaded adapter's {peft_config.get(key)!r}: set that value or null"
        for key in differing
    ]
    if faults:
        raise UserError(*faults)


def _differ(wanted: object, loaded: object) -> bool:
    return wanted is not None and _comparable(wanted) != _comparable(loaded)


def _comparable(value: object) -> object:
    """Lists without their order; what says nothing (an empty list or mapping) as None."""
    if isinstance(value, list | tuple | set | frozenset):
        return sorted(map(str, value)) or None
    if isinstance(value, Mapping):
        return dict(value) or None
    return value


def _same_places(args: LoraArgs, peft_config: Mapping[str, object], base: PreTrainedModel | None) -> bool:
    """Filters that the yaml leaves null are the adapter's."""
    assert base is not None
    loaded, config = _peft_config(peft_config), _of_yaml(args, base)
    for key in FILTERS:
        if getattr(args, key) is None:
            setattr(config, key, getattr(loaded, key))
    wanted, there = find_targets(base, config), find_targets(base, loaded, ADAPTERS)
    return (wanted.modules, wanted.experts) == (there.modules, there.experts)


def _peft_config(plain: Mapping[str, object]) -> LoraConfig:
    config: LoraConfig = PeftConfig.from_peft_type(**dict(plain))
    return config


def _check_orientation(args: LoraArgs, found: Targets) -> None:
    if args.fan_in_fan_out not in (None, found.fan_in_fan_out):
        kind = "Conv1D, which stores its weight [in, out]" if found.fan_in_fan_out else "linear layers, [out, in]"
        raise UserError(f"{AT}fan_in_fan_out={str(args.fan_in_fan_out).lower()}: the targets are {kind}; leave it null")


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
