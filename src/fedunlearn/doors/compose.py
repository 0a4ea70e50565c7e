"""Hydra's composition, with every fault told at once instead of the first."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.doors.groups import Groups, open_groups
from fedunlearn.doors.older_names import Translated, in_todays_names, own_kept
from fedunlearn.doors.override import SEARCHPATH, UserOverride, read_override
from fedunlearn.errors import UserError

log = logging.getLogger(__name__)
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError)


@dataclass(frozen=True, kw_only=True)
class ComposedConfig:
    """A run's configuration three times over: `plain` as composed and resolved, `run` as records, `text` as YAML to be saved."""

    plain: Mapping[str, object]
    run: TrainRun | EvalRun
    text: str


@dataclass(frozen=True, kw_only=True)
class _Sound:
    """What is left of a faulty command line: overrides that compose, and the faults of the others."""

    overrides: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def compose(config_dir: Path, config_name: str, overrides: Sequence[str]) -> ComposedConfig:
    """Composes `config_name` (with or without .yaml) of `config_dir` under the overrides and reads it into records.

    A key that no YAML has needs no plus: the records decide which keys there are. Raises UserError with all faults: of the
    command line, of the groups, of the records.
    """
    with _hydra(config_dir):
        groups = open_groups(config_dir, config_name)
        read = [read_override(text, groups.names) for text in overrides]
        if any(override.fault for override in read):
            raise _all_faults(groups, read, whole="")
        try:
            config = _resolved(config_name, [override.text for override in read])
        except _COMPOSITION_ERRORS as error:
            raise _all_faults(groups, read, whole=groups.explain(None, error)) from error
        translated = _translated(config_name, read, config)
        for line in translated.told:
            log.warning("%s", line)
        run = _parsed(translated)
        text = OmegaConf.to_yaml(OmegaConf.create(translated.plain) if translated.told else config)
        return ComposedConfig(plain=translated.plain, run=run, text=text)


def checked_overrides(config_dir: Path, config_name: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """Gives the overrides as `compose` hands them to Hydra. Raises UserError with the faults of composition alone: no record is made."""
    with _hydra(config_dir):
        groups = open_groups(config_dir, config_name)
        sound = _sound(groups, [read_override(text, groups.names) for text in overrides])
        if sound.faults:
            raise UserError(*sound.faults)
        return sound.overrides


def _hydra(config_dir: Path) -> hydra.initialize_config_dir:
    if not config_dir.is_dir():
        raise UserError(
            f"--config-path={str(config_dir)!r} is no folder: give the folder of train-lora.yaml, unlearn-lora.yaml and eval.yaml"
        )
    return hydra.initialize_config_dir(str(config_dir.resolve()), version_base="1.3")


def _all_faults(groups: Groups, overrides: Sequence[UserOverride], whole: str) -> UserError:
    """Gathers the faults of single overrides (where there is none: `whole`) and those that the records find in the rest."""
    sound = _sound(groups, overrides)
    faults = sound.faults or (whole,)
    kept = [override for override in overrides if override.text in sound.overrides]
    try:
        _parsed(_translated(groups.config_name, kept, _resolved(groups.config_name, sound.overrides)))
    except UserError as error:
        faults += error.faults
    except _COMPOSITION_ERRORS as error:
        faults += (groups.explain(None, error),)
    return UserError(*dict.fromkeys(faults))


def _sound(groups: Groups, overrides: Sequence[UserOverride]) -> _Sound:
    """Tries group choices one after another, then each other override on top of the sound ones."""
    kept: list[str] = []
    faults = [override.fault for override in overrides if override.fault]
    for override in sorted(
        (override for override in overrides if not override.fault), key=lambda override: override.order
    ):
        error = _error_of(groups.config_name, [*kept, override.text])
        if error is None:
            kept.append(override.text)
            continue
        faults.append(groups.explain(override, error))
        kept += [
            choice for choice in groups.nearest(override) if _error_of(groups.config_name, [*kept, choice]) is None
        ]
    return _Sound(overrides=tuple(kept), faults=tuple(faults))


def _error_of(config_name: str, overrides: Sequence[str]) -> Exception | None:
    try:
        _resolved(config_name, overrides)
    except _COMPOSITION_ERRORS as error:
        return error
    return None


def _resolved(config_name: str, overrides: Sequence[str]) -> DictConfig:
    config = hydra.compose(config_name, list(overrides))
    OmegaConf.resolve(config)
    return config


def _translated(config_name: str, overrides: Sequence[UserOverride], config: DictConfig) -> Translated:
    """The config under today's names. What the files of the groups `model` and `lora` say by themselves is only asked for where it matters."""

    def shipped() -> Mapping[str, object]:
        choices = hydra.compose(
            config_name, [o.text for o in overrides], return_hydra_config=True
        ).hydra.runtime.choices
        chosen = [f"{group}={choices[group]}" for group in ("model", "lora") if choices.get(group)]
        places = [override.text for override in overrides if override.key == SEARCHPATH]
        return _plain(hydra.compose(config_name, [*places, *chosen]))

    said = {override.key for override in overrides}
    return own_kept(in_todays_names(_plain(config), said, shipped), said)


def _parsed(translated: Translated) -> TrainRun | EvalRun:
    """The records. Raises UserError with the faults of older names and of the records."""
    try:
        run = parse_config(translated.plain)
    except UserError as error:
        raise UserError(*translated.faults, *error.faults) from error
    if translated.faults:
        raise UserError(*translated.faults)
    return run


def _plain(config: DictConfig) -> dict[str, object]:
    return cast("dict[str, object]", OmegaConf.to_container(config))


def as_composed(plain: Mapping[str, object]) -> ComposedConfig:
    """Gives a config that was composed elsewhere. Raises UserError as the records do."""
    return ComposedConfig(plain=plain, run=parse_config(plain), text=OmegaConf.to_yaml(OmegaConf.create(dict(plain))))


def changed(composed: ComposedConfig, changes: Mapping[str, object]) -> ComposedConfig:
    """Gives the config with other values at its top level."""
    return as_composed({**composed.plain, **changes})


def model_from(plain: Mapping[str, object], path: str) -> dict[str, object]:
    """Gives the config's model, loaded from another path: a run, an adapter or a base. An initialisation stays behind: adapters bring their values along."""
    model = cast("Mapping[str, Mapping[str, object]]", plain["model"])
    args = {**model["model_args"], "pretrained_model_name_or_path": path, "lora_model_path": None}
    lora = cast("Mapping[str, object] | None", args.get("lora_config"))
    if lora is not None and lora.get("init_lora_weights") is not None:
        args["lora_config"] = {**lora, "init_lora_weights": None}
    return {**model, "model_args": args}
