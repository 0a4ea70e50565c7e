"""LoRA's settings under the names that other systems give them (slime, ROLL, LLaMA-Factory, InfiniTrain), put under today's, each with one line."""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from fedunlearn.config.data import FOLDER_OF_MODE

MODEL_ARGS = "model.model_args"
LORA = f"{MODEL_ARGS}.lora_config"
PLACES = ("", f"{MODEL_ARGS}.", f"{LORA}.")
RANKS = ("lora_rank", "rank")
LISTS = ("lora_target", "lora_target_modules")
LOAD, SAVE = "lora_load_path", "lora_save_path"
TODAY: Mapping[str, str] = {
    **dict.fromkeys(RANKS, f"{LORA}.r"),
    **dict.fromkeys(LISTS, f"{LORA}.target_modules"),
    LOAD: f"{MODEL_ARGS}.lora_model_path",
}
KINDS = {"attention": "attention", "mlp": "mlp", "all-linear": "all-linear", "all": "all-linear"}
"""Words that stand for many modules, and what they are called here; any other word is a module's name."""
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Translated:
    """plain: the config without older names. told: one line a name that was understood. faults: one sentence a name that was not."""

    plain: dict[str, object]
    told: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()


def is_older_list(key: str) -> bool:
    """Whether a key of the command line is an older name for a list, whose commas make no sweep."""
    return any(key == place + name for place in PLACES for name in LISTS)


def in_todays_names(
    plain: Mapping[str, object], said: Collection[str], shipped: Callable[[], Mapping[str, object]]
) -> Translated:
    """Puts older names at the top level, in model.model_args or in its lora_config under today's.

    said: the keys of the command line, which beat every YAML. shipped: gives what the model's and the preset's own files say; whatever
    of it another YAML changes counts as set. A value set by two names is a fault, whichever they are.
    """
    found = [
        (place + name, name) for place in PLACES for name in (*TODAY, SAVE) if _get(plain, place + name) is not _ABSENT
    ]
    if not found:
        return Translated(plain=dict(plain))
    made = copy.deepcopy(dict(plain))
    values = {key: _pop(made, key) for key, _ in found}
    told: list[str] = []
    faults: list[str] = []
    group, taken = shipped(), dict[str, str]()
    for key, name in found:
        if name == SAVE:
            (told if _is_written_there(plain, values[key]) else faults).append(_of_saving(plain, key, values[key]))
            continue
        today = TODAY[name]
        other = taken.get(today) or (today if _is_set(plain, key, today, said, group) else None)
        if other:
            faults.append(
                f"{key}={values[key]!r} beside {other}={_shown(plain, other)}, which is the same setting by another name: give {today} alone"
            )
            continue
        taken[today] = key
        value = _value(name, values[key])
        _put(made, today, value)
        told.append(f"{key}={values[key]!r} is understood as {today}={value!r}, its name here")
    return Translated(plain=made, told=tuple(told), faults=tuple(faults))


def own_kept(translated: Translated, said: Collection[str]) -> Translated:
    """Takes what the command line says out of what a preset lets a base change (lora_config.adapts), and refuses what only a preset may say of itself."""
    lora = _get(translated.plain, LORA)
    faults = tuple(
        f"{LORA}.{key} is set by a preset alone: choose one with lora=fast, balanced or high, and leave it out"
        for key in ("preset", "adapts")
        if f"{LORA}.{key}" in said
    )
    adapts = lora.get("adapts") if isinstance(lora, Mapping) else None
    if not isinstance(adapts, list):
        return replace(translated, faults=(*translated.faults, *faults))
    today = {*said, *(TODAY[name] for place in PLACES for name in TODAY if place + name in said)}
    plain = copy.deepcopy(translated.plain)
    _put(plain, f"{LORA}.adapts", [key for key in adapts if f"{LORA}.{key}" not in today])
    return replace(translated, plain=plain, faults=(*translated.faults, *faults))


def _value(name: str, value: object) -> object:
    if name in LISTS and isinstance(value, str):
        words = [word.strip() for word in value.split(",") if word.strip()]
        return KINDS[words[0]] if len(words) == 1 and words[0] in KINDS else words
    if name == LOAD and value == "":
        return None
    return value


def _is_set(
    plain: Mapping[str, object], key: str, today: str, said: Collection[str], group: Mapping[str, object]
) -> bool:
    """Whether today's name has a value of the user's own beside the older name's."""
    if key in said:
        return today in said
    now = _get(plain, today)
    if now in (_ABSENT, None):
        return False
    return _get(group, key) is not _ABSENT or now != _get(group, today) or today in said


def _of_saving(plain: Mapping[str, object], key: str, value: object) -> str:
    said = f"{key}={value!r}"
    if plain.get("mode") not in ("train", "unlearn"):
        return f"{said}: a run of mode {plain.get('mode')} makes no adapter; leave it out"
    where = _written(plain)
    if _is_written_there(plain, value):
        return f"{said} is where the run writes its adapter: paths.saves_dir and task_name say so here"
    return f"{said}: a run writes its adapter to paths.saves_dir/{_kind(plain)}/<task_name>/adapter, here {str(where)!r}; leave it out, or set those two"


def _is_written_there(plain: Mapping[str, object], value: object) -> bool:
    makes = plain.get("mode") in ("train", "unlearn")
    return makes and isinstance(value, str) and Path(value) == _written(plain)


def _written(plain: Mapping[str, object]) -> Path:
    return Path(str(_get(plain, "paths.saves_dir"))) / _kind(plain) / str(plain.get("task_name")) / "adapter"


def _kind(plain: Mapping[str, object]) -> str:
    return FOLDER_OF_MODE[str(plain["mode"])]


def _shown(plain: Mapping[str, object], key: str) -> str:
    return repr(_get(plain, key))


def _get(tree: object, key: str) -> object:
    for name in key.split("."):
        tree = tree[name] if isinstance(tree, Mapping) and name in tree else _ABSENT
    return tree


def _pop(tree: Mapping[str, object], key: str) -> object:
    above, _, name = key.rpartition(".")
    holder = _get(tree, above) if above else tree
    return cast("dict[str, object]", holder).pop(name)


def _put(tree: dict[str, object], key: str, value: object) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = cast("dict[str, object]", tree[parent])
    tree[name] = value
