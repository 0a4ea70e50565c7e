"""A submitted config on the server's machine: its own places in it for the run, and the brief that clients get of it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fedunlearn
from fedunlearn.config.run import TrainRun
from fedunlearn.config.sites import ServerSite
from fedunlearn.data.ownership import FILE as PARTITION
from fedunlearn.data.requests import FILE as REQUEST
from fedunlearn.errors import UserError
from fedunlearn.federation.deployed.brief import Brief
from fedunlearn.federation.deployed.enrolment import files_of_one_machine
from fedunlearn.federation.start import load_start
from fedunlearn.models.lora_config import WHAT, WHERE
from fedunlearn.models.source import resolve_source

MODEL = "pretrained_model_name_or_path"
OF_THE_ADAPTER = tuple(key for key in (*WHERE, *WHAT) if key != "init_lora_weights")
"""What nodes are told of the run's adapter in place of the yaml's: all that decides which tensors there are, and how they act."""


def at_server(site: ServerSite, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the config with the server's own places: data, the base behind a model's id, saves_root, device.

    A path in it may name runs under paths.saves_dir only, which are looked for under saves_root. Raises UserError, all faults at once, for any other.
    """
    places = _Places(site, str(plain["paths"]["saves_dir"]), [])
    args = {**plain["model"]["model_args"]}
    named = str(args[MODEL])
    args[MODEL] = site.models.get(named) or places.run(f"model.model_args.{MODEL}", named)
    args["lora_model_path"] = places.run_or_none("model.model_args.lora_model_path", args["lora_model_path"])
    args["device"] = site.device or args["device"]
    found = {
        **plain,
        "tofu_path": site.data.tofu_path,
        "muse_path": site.data.muse_path,
        "retain_logs_path": places.run_or_none("retain_logs_path", plain["retain_logs_path"]),
        "model": {**plain["model"], "model_args": args},
        "partition": _with_run(places, plain, "partition", "path"),
        "eval": _with_run(places, plain, "eval", "reference_model_path"),
        "paths": {
            "saves_dir": site.saves_root,
            "pocket_dir": str(Path(site.work_dir) / "pocket"),
            "cache_dir": str(Path(site.work_dir) / "cache"),
        },
    }
    faults = [*places.faults, *_own_faults(site, plain)]
    if faults:
        raise UserError(*faults)
    return found


def _own_faults(site: ServerSite, plain: Mapping[str, Any]) -> Iterator[str]:
    wanted = "muse_path" if plain["muse_path"] is not None else "tofu_path"
    if getattr(site.data, wanted) is None:
        yield f"{wanted}={plain[wanted]!r}: the server's site YAML names no data.{wanted}"
    for key, named in files_of_one_machine(plain):
        yield f"{key}={named!r} is a file of one machine, which nodes do not have: leave it null"


def _with_run(places: "_Places", plain: Mapping[str, Any], block: str, key: str) -> dict[str, Any]:
    return {**plain[block], key: places.run_or_none(f"{block}.{key}", plain[block][key])}


@dataclass(frozen=True)
class _Places:
    """Where runs lie. saves: the submitter's saves_dir; faults: grows with every path that names none."""

    site: ServerSite
    saves: str
    faults: list[str]

    def run_or_none(self, key: str, named: str | None) -> str | None:
        """As `run`; None stays."""
        return None if named is None else self.run(key, named)

    def run(self, key: str, named: str) -> str:
        """The place under saves_root of what a path names under the submitter's saves_dir."""
        path = PurePosixPath(named)
        if path.is_relative_to(self.saves) and ".." not in path.parts:
            found = Path(self.site.saves_root) / path.relative_to(self.saves)
            if found.exists():
                return str(found)
            self.faults.append(f"{key}={named!r}: the server has no such run under its saves_root")
        else:
            ids = f", or a model's id, one of {', '.join(self.site.models)}" if key.endswith(MODEL) else ""
            self.faults.append(
                f"{key}={named!r} names nothing on the server: give a run of its own as {self.saves}/finetune/NAME or {self.saves}/unlearn/NAME{ids}"
            )
        return named


def brief_of(site: ServerSite, run: TrainRun, plain: Mapping[str, Any], folder: Path) -> Brief:
    """What nodes are told of a prepared run: the config with the base's id and the adapter's shape in the place of paths, and who owns what."""
    base = resolve_source(run.model.model_args, Path(run.paths.pocket_dir)).base.resolve()
    ids = [name for name, path in site.models.items() if Path(path).resolve() == base]
    if not ids:
        raise UserError(
            f"the base {str(base)!r} of the run's adapter has no id that nodes could know it by: name it in the server's site YAML (models)"
        )
    shape = load_start(folder).adapter.peft_config
    model = plain["model"]
    args = model["model_args"]
    lora = shaped(args["lora_config"], shape)
    config = {
        **plain,
        "task_name": "run",
        "tofu_path": None if run.tofu_path is None else "tofu",
        "muse_path": None if run.muse_path is None else "muse",
        "retain_logs_path": None,
        "requests": None,
        "model": {**model, "model_args": {**args, MODEL: ids[0], "lora_model_path": None, "lora_config": lora}},
        "partition": {**plain["partition"], "path": None},
        "eval": {**plain["eval"], "reference_model_path": None},
        "launcher": {"threads": plain["launcher"]["threads"]},
        "paths": dict.fromkeys(plain["paths"], ""),
    }
    return Brief(
        version=fedunlearn.__version__,
        config=json.loads(json.dumps(config)),
        partition=(folder / PARTITION).read_text(encoding="utf-8"),
        request=(folder / REQUEST).read_text(encoding="utf-8"),
    )


def shaped(lora: Mapping[str, Any], peft_config: Mapping[str, Any]) -> dict[str, Any]:
    """A yaml's lora_config with the shape of an adapter that is there: nodes make theirs of it, and have no adapter to take it from."""
    known = {key: peft_config[key] for key in OF_THE_ADAPTER if key in peft_config}
    empty = {key for key, value in known.items() if value in ([], {}) and key != "target_modules"}
    if peft_config.get("peft_type") == "ADALORA":  # whose ranks are init_r's, which the yaml has
        empty |= {"r"}
    return {**lora, **known, **dict.fromkeys(empty)}
