"""`adapter.py summary`: parameters of a base and an adapter, of files or of a config alone."""

from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from fedunlearn.config.lora import LoraArgs
from fedunlearn.data.pocket.named import named_pocket
from fedunlearn.doors.adapter_named import read_adapter
from fedunlearn.errors import UserError
from fedunlearn.models.skeleton import skeleton
from fedunlearn.models.source import FACTORS, HUB_ID, adapter_folder, base_of_adapter
from fedunlearn.models.summary import (
    Summary,
    files_bytes,
    read_config,
    summarise_adapter,
    summarise_base,
    summarise_fresh,
)


def summarise(path: Path, lora: LoraArgs | None, base: str | None, pocket_dir: Path) -> Summary:
    """Counts what a path names: a PEFT folder or a run beside its base's config; a model's folder or its config.json, with the adapter `lora` would be.

    base: an adapter's, None for the one that it names. No weight of a base is read. Raises UserError for what is none of these, for `lora` beside an
    adapter that is there, and for `base` beside a model.
    """
    place = path.expanduser()
    is_adapter = not place.is_file() and ((place / FACTORS).is_dir() or adapter_folder(place, "path") is not None)
    if not is_adapter and base is not None:
        raise UserError(f"--base {base!r} beside {str(path)!r}, which is a model itself: leave it out")
    if place.is_file():
        return _of_config(read_config(place), str(path), lora)
    if not is_adapter:
        found = _of_config(read_config(place), str(path), lora)
        return replace(found, file_bytes=files_bytes(place))
    if lora is not None:
        raise UserError(
            f"{str(path)!r} is an adapter, which has its own r, alpha and targets: leave --r, --alpha and --targets out, or name a base"
        )
    folder, adapter = read_adapter(place)
    named = base or str(adapter.peft_config.get("base_model_name_or_path") or base_of_adapter(folder))
    found = summarise_adapter(adapter, skeleton(_config_of(named, pocket_dir)), named)
    return replace(found, file_bytes=files_bytes(folder / FACTORS if (folder / FACTORS).is_dir() else folder))


def _of_config(config: PretrainedConfig, name: str, lora: LoraArgs | None) -> Summary:
    base = skeleton(config)
    return summarise_base(base, name) if lora is None else summarise_fresh(base, lora, name)


def _config_of(base: str, pocket_dir: Path) -> PretrainedConfig:
    """The config of a base that is here, or on the hub; its weights are not asked for."""
    place = Path(base).expanduser()
    if place.exists():
        return read_config(place)
    pocket = named_pocket(base, pocket_dir)
    if pocket is not None:
        return read_config(pocket.model)
    try:
        if not HUB_ID.match(base):
            raise ValueError("no such folder")
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"the config of the base {base!r} cannot be read ({type(error).__name__}): give its config.json or folder with --base"
        ) from error
