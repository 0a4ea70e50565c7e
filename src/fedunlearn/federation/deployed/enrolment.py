"""A run as one node takes part in it: the server's config with this machine's own places in it, kept on its disk. Knows no torch."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedunlearn
from fedunlearn.config.data import FOLDER_OF_MODE
from fedunlearn.config.sites import ClientSite
from fedunlearn.errors import UserError
from fedunlearn.federation.deployed.brief import Brief
from fedunlearn.files import canonical_json, whole_folder, write_bytes, write_json

CONFIG, PARTITION, REQUEST, RUN = "config.json", "partition.json", "request.json", "run"
MODES = ("train", "unlearn")
KEPT_RUNS = 32
OURS = ("fedunlearn.", "flwr.serverapp.strategy.")
HERE = {"_target_": "fedunlearn.config.launcher.LocalLauncher"}
_FILES = (
    ("data", "alternates_path"),
    ("data", "idk_path"),
    ("model", "tokenizer_args", "pretrained_model_name_or_path"),
)
_OBJECTS = (("model",), ("model", "model_args"), ("partition",), ("launcher",))


@dataclass(frozen=True)
class Enrolment:
    """One run on this node. folder: <work_dir>/runs/<run id of Flower>."""

    folder: Path

    @property
    def exists(self) -> bool:
        """Whether the roll call of that run was answered here."""
        return (self.folder / CONFIG).is_file()

    def read_config(self) -> dict[str, Any]:
        """The localised config, JSON values."""
        config: dict[str, Any] = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        return config

    @property
    def worker_key(self) -> str:
        """The name of the worker that serves it: runs on one base, loaded alike, share one."""
        model = self.read_config()["model"]
        return hashlib.sha256(canonical_json(model).encode()).hexdigest()[:12]


def enrolment_of(site: ClientSite, run_id: int) -> Enrolment:
    """Where a run lies on this node, whether or not it is there yet."""
    return Enrolment(Path(site.work_dir) / "runs" / str(run_id))


def enrol(site: ClientSite, run_id: int, brief: Brief) -> Enrolment:
    """Writes a run down on this node, as the site's policy allows it. Raises UserError with every reason why this node does not take part."""
    if brief.version != fedunlearn.__version__:
        raise UserError(
            f"this node has fedunlearn {fedunlearn.__version__}, the server {brief.version}: install the same version on both"
        )
    faults = [
        *_shape_faults(brief.config),
        *_model_faults(site, brief.config),
        *_data_faults(site, brief.config),
        *_target_faults(site, brief.config),
        *_file_faults(brief.config),
    ]
    if faults:
        raise UserError(*faults)
    enrolment = enrolment_of(site, run_id)
    plain = localised(site, brief.config, enrolment.folder)
    inside = Path("saves") / FOLDER_OF_MODE[plain["mode"]] / RUN
    with whole_folder(enrolment.folder) as folder:
        write_json(folder / CONFIG, plain)
        write_bytes(folder / inside / PARTITION, brief.partition.encode())
        write_bytes(folder / inside / REQUEST, brief.request.encode())
    _forget_old_runs(enrolment)
    return enrolment


def _forget_old_runs(present: Enrolment) -> None:
    """Leaves the newest KEPT_RUNS; a run that is still under way and has gone is refused by name, and is called again when it is submitted again."""
    folders = (folder for folder in present.folder.parent.iterdir() if folder.name.isdecimal())
    newest = sorted(folders, key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
    for folder in newest[KEPT_RUNS:]:
        if folder != present.folder:
            shutil.rmtree(folder, ignore_errors=True)


def localised(site: ClientSite, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Gives the config with this machine's places for data, base and device; nothing that came over the wire is left to be opened."""
    model = config["model"]
    args = {
        **model["model_args"],
        "pretrained_model_name_or_path": site.models[model["model_args"]["pretrained_model_name_or_path"]],
        "lora_model_path": None,
        "device": site.device or "auto",
    }
    return {
        **config,
        "task_name": RUN,
        "tofu_path": site.data.tofu_path,
        "muse_path": site.data.muse_path,
        "retain_logs_path": None,
        "overwrite": False,
        "resume": False,
        "model": {**model, "model_args": args},
        "partition": {**config["partition"], "path": None},
        "launcher": {**HERE, "threads": config["launcher"].get("threads")},
        "paths": {
            "saves_dir": str(folder / "saves"),
            "pocket_dir": str(Path(site.work_dir) / "pocket"),
            "cache_dir": str(Path(site.work_dir) / "cache"),
        },
    }


def _shape_faults(config: Mapping[str, Any]) -> Iterator[str]:
    for keys in _OBJECTS:
        if not isinstance(_value_at(config, keys), Mapping):
            yield f"the server's config has no {'.'.join(keys)}"


def _file_faults(config: Mapping[str, Any]) -> Iterator[str]:
    for key, named in files_of_one_machine(config):
        yield f"the server's config names the file {key}={str(named)[:200]!r}, which only it has: leave it null"


def files_of_one_machine(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Gives each key of a config that names a file which other machines cannot have, with what it names."""
    for keys in _FILES:
        named = _value_at(config, keys)
        if named is not None and (keys[-1], named) != ("idk_path", "builtin"):
            yield ".".join(keys), named


def _model_faults(site: ClientSite, config: Mapping[str, Any]) -> Iterator[str]:
    named = _value_at(config, ("model", "model_args", "pretrained_model_name_or_path"))
    allowed = list(site.policy.models)
    if str(config.get("mode")) not in MODES:
        yield f"the server asks for mode={str(config.get('mode'))[:200]!r}; a node trains and unlearns"
    if named not in allowed:
        yield f"this node's policy does not allow model {str(named)[:200]!r}; it allows {allowed} (policy: models)"
    elif named not in site.models:
        yield f"this node has no folder for model {named!r}: name it in its site YAML (models)"


def _data_faults(site: ClientSite, config: Mapping[str, Any]) -> Iterator[str]:
    wanted = "muse_path" if config.get("muse_path") is not None else "tofu_path"
    if getattr(site.data, wanted) is None:
        yield f"the run is about {wanted.removesuffix('_path').upper()}, this node's site YAML names no data.{wanted}"
    elif (missing := site.data.missing()) is not None:
        yield missing


def _target_faults(site: ClientSite, config: Mapping[str, Any]) -> Iterator[str]:
    for name in _targets(config):
        if not name.startswith(OURS) and name not in site.policy.allowed_targets:
            yield f"the server's config names the class {name[:200]!r}, which this node's policy does not allow (policy: allowed_targets)"


def _targets(value: object) -> Iterator[str]:
    """Every `_target_` of a config, however deep."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            yield str(value["_target_"])
        for inner in value.values():
            yield from _targets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _targets(inner)


def _value_at(config: Mapping[str, Any], keys: tuple[str, ...]) -> object:
    """The value of a key, block by block; None where there is none."""
    value: object = config
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
