"""PEFT's config of the yaml's `lora_config` and of a loaded adapter, and where the two disagree."""

from collections.abc import Mapping

from peft import LoraConfig, PeftConfig

from fedunlearn.config.lora import LoraArgs, given
from fedunlearn.errors import UserError
from fedunlearn.records.adapter import Adapter

PLAIN: Mapping[str, tuple[object, ...]] = {
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
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
        config = LoraConfig(**given(args))
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
