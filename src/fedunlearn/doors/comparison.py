"""What a comparison is asked for: the words of its command line against its recipe, every fault told before anything runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedunlearn.errors import UserError, did_you_mean

RECIPES = "unlearn/tofu/"
KEYS = ("experiment", "methods", "seeds", "request", "requests", "task_name", "saves_dir", "pocket_dir")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared. recipe: configs/compare/<name>.yaml as it stands. requests: what is asked for, one after the other; None is the recipe's forget split."""

    recipe: Mapping[str, Any]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    request: str
    requests: tuple[str | None, ...]
    task_name: str
    configs: Path
    saves: Path
    pocket_dir: Path


def read_comparison(argv: Sequence[str], configs: Path) -> Comparison:
    """Reads key=value words. Raises UserError for keys and values that are unknown or of another kind, telling all at once."""
    given = _given(argv)
    recipe = _recipe(str(given.get("experiment", f"{RECIPES}pocket")), configs / "compare")
    methods, seeds = given.get("methods", list(recipe["methods"])), given.get("seeds", [0])
    request = str(given.get("request", "sample"))
    asked = recipe["requests"].get(request, {})
    requests = given.get("requests", asked.get("requests", [None]))
    faults = [*_method_faults(methods, recipe["methods"]), *_seed_faults(seeds), *_request_faults(requests)]
    if request not in recipe["requests"]:
        faults.append(f"request={request!r} is unknown: known are {', '.join(recipe['requests'])}")
    if faults:
        raise UserError(*faults)
    return Comparison(
        recipe=recipe,
        methods=tuple(methods),
        seeds=tuple(seeds),
        request=request,
        requests=tuple(None if one is None else _word(one) for one in requests),
        task_name=str(given.get("task_name", "compare")),
        configs=configs,
        saves=Path(str(given.get("saves_dir", "saves"))),
        pocket_dir=Path(str(given.get("pocket_dir", "saves/pocket"))),
    )


def _given(argv: Sequence[str]) -> dict[str, Any]:
    keys = [word.partition("=")[0] for word in argv]
    faults = [
        f"{word!r} is no setting of a comparison{did_you_mean(key, KEYS) or '.'} Known: {', '.join(KEYS)}, each as key=value"
        for word, key in zip(argv, keys, strict=True)
        if key not in KEYS or "=" not in word
    ]
    faults += [f"{key} is given twice: leave one of them out" for key in _twice(keys) if key in KEYS]
    found: dict[str, Any] = {}
    for word in [] if faults else argv:
        try:
            read = OmegaConf.to_container(OmegaConf.from_dotlist([word]))
        except (yaml.YAMLError, OmegaConfBaseException):
            faults.append(f"{word!r} cannot be read: give a value, or a list in brackets, as in methods=[npo,rmu]")
            continue
        found.update(cast("dict[str, Any]", read))
    if faults:
        raise UserError(*faults)
    return found


def _recipe(experiment: str, folder: Path) -> dict[str, Any]:
    known = {f"{RECIPES}{file.stem}": file for file in sorted(folder.glob("*.yaml"))}
    if experiment not in known:
        raise UserError(
            f"experiment={experiment!r} has no recipe for comparing{did_you_mean(experiment, known) or '.'} Known: {', '.join(known)} ({folder}/)"
        )
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(known[experiment])))


def _method_faults(methods: object, known: Mapping[str, object]) -> Iterator[str]:
    if not isinstance(methods, list) or not methods:
        yield f"methods={_word(methods)} is no list of methods: give one in brackets, as in methods=[npo,rmu], or leave it out for all"
        return
    for name in dict.fromkeys(map(_word, methods)):
        if name not in known:
            yield f"methods: {name!r} is unknown{did_you_mean(name, known) or '.'} Known: {', '.join(known)}"
    for again in _twice(methods):
        yield f"methods: {_word(again)!r} stands there twice: one row a method; leave one out"


def _seed_faults(seeds: object) -> Iterator[str]:
    if not isinstance(seeds, list) or not seeds:
        yield f"seeds={_word(seeds)} is no list of seeds: give one in brackets, as in seeds=[0,1,2]"
        return
    for seed in seeds:
        if type(seed) is not int or seed < 0:
            yield f"seeds: {_word(seed)!r} is no seed: allowed are whole numbers from 0, as in seeds=[0,1,2]"
    for again in _twice(seeds):
        yield f"seeds: {_word(again)} stands there twice, and would count twice in every mean: leave one out"


def _request_faults(requests: object) -> Iterator[str]:
    if not isinstance(requests, list) or not requests:
        yield (
            f"requests={_word(requests)} is no list of requests: give one in brackets, as in requests=[{{authors: [18]}}], or leave it out for the recipe's own"
        )
        return
    for number, one in enumerate(requests):
        if not isinstance(one, dict) and requests != [None]:  # that one is the recipe's forget split
            yield f"requests[{number}]={_word(one)} is no request: name rows, authors or a client, as in {{authors: [18]}}"


def _twice(values: Sequence[object]) -> list[object]:
    return list(dict.fromkeys(value for number, value in enumerate(values) if value in values[:number]))


def _word(value: object) -> str:
    """Writes a value as a command line's override has it: keys without quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_word(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_word, value)) + "]"
    return "null" if value is None else str(value)
