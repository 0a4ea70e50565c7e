"""What `pretrained_model_name_or_path` and `lora_model_path` name: looked at, never guessed."""

import re
from dataclasses import dataclass
from pathlib import Path

from fedunlearn.config.model import ModelArgs
from fedunlearn.data.pocket.named import named_pocket
from fedunlearn.errors import UserError
from fedunlearn.files import read_object

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
FACTORS = "factors"
"""The folder that a round has in place of adapter/ where a side-car lies beside its factors (federation.checkpoint)."""
START, BEGAN = "start", "began.json"
"""What a run began with, and the file beside it that tells whether a side-car belongs to it (federation.start)."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """base: folder of the full model on this disk. base_name: what the user or the adapter calls it (a hub id or a path).

    adapter: a PEFT folder to start from, or None. run: the run of ours that adapter lies in, or None.
    """

    base: Path
    base_name: str
    adapter: Path | None = None
    run: Path | None = None


def resolve_source(args: ModelArgs, pocket_dir: Path, *, fetch: bool = True) -> ModelSource:
    """Finds base and adapter. Builds the pocket or fetches from the hub where that is what is named.

    fetch=False: neither is done, and the base is then not looked at: for checks after a fault is known.
    Raises UserError for a missing path, an empty folder, two adapters, an adapter whose base cannot be found, a hub that
    cannot be reached.
    """
    key = "model.model_args.pretrained_model_name_or_path"
    named = args.pretrained_model_name_or_path
    first = adapter_folder(Path(named).expanduser(), key) if Path(named).expanduser().is_dir() else None
    second = None
    if args.lora_model_path is not None:
        second = adapter_folder(Path(args.lora_model_path).expanduser(), "model.model_args.lora_model_path")
        if second is None:
            raise UserError(
                f"model.model_args.lora_model_path={args.lora_model_path!r} is a full model, no adapter: name it as {key.rsplit('.', 1)[1]}"
            )
    if first and second:
        raise UserError(
            f"two adapters are named: {key}={named!r} and lora_model_path={args.lora_model_path!r}: give one of them"
        )
    adapter = first or second
    if adapter and not args.use_lora:
        raise UserError(f"model.model_args.use_lora=false, but {str(adapter)!r} is an adapter: set use_lora=true")
    base_name = base_of_adapter(adapter) if first and adapter else named
    elsewhere = HUB_ID.match(base_name) or base_name.startswith("pocket:")
    if not fetch and elsewhere and not Path(base_name).is_dir():
        return ModelSource(base=Path(base_name), base_name=base_name, adapter=adapter, run=run_of(adapter))
    where = key if not first else f"the base in {str(first / 'adapter_config.json')!r}, base_model_name_or_path"
    base = find_base(base_name, pocket_dir, where)
    public_name = str(base) if named_pocket(base_name, pocket_dir) else base_name
    return ModelSource(base=base, base_name=public_name, adapter=adapter, run=run_of(adapter))


def adapter_folder(path: Path, key: str) -> Path | None:
    """Gives the PEFT folder that a path names (itself, or a run's `adapter`), or None for a full model.

    Raises UserError where the path does not exist, is an unfinished run, a round or a beginning with a side-car (their factors alone are no result), or holds neither.
    """
    if not path.exists():
        raise UserError(
            f"{key}={str(path)!r} does not exist: give a model folder, a PEFT adapter folder or a run's folder"
        )
    round_ = path.parent if path.name == FACTORS and (path.parent / "checkpoint.json").is_file() else path
    if (round_ / FACTORS / "adapter_config.json").is_file():
        raise UserError(
            f"{key}={str(path)!r} is a round with a side-car, no PEFT folder yet: write one with `adapter.py export {round_} --to FOLDER` first, and name that"
        )
    if (path / "adapter_config.json").is_file():
        _refuse_beginning(path, key)
        return path
    if (path / "adapter" / "adapter_config.json").is_file():
        return path / "adapter"
    if (path / "config.json").is_file():
        _refuse_run(path, key)
        return None
    raise UserError(
        f"{key}={str(path)!r} holds neither config.json (a model) nor adapter_config.json (an adapter) nor adapter/ (a run): name such a folder"
    )


def _refuse_beginning(path: Path, key: str) -> None:
    """Raises UserError for what a run with a side-car began with: its factors alone would load, and act as another adapter."""
    if path.name != START or not (path.parent / BEGAN).is_file():
        return
    try:
        sidecar = read_object(path.parent / BEGAN).get("sidecar")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}={str(path)!r}: what lies beside it is damaged ({error}); name the run's result"
        ) from error
    if sidecar:
        raise UserError(
            f"{key}={str(path)!r} is what a run with a side-car began with, no PEFT folder: name the run, one of its rounds, or what it began from"
        )


def _refuse_run(path: Path, key: str) -> None:
    """Raises UserError where config.json is that of a run of ours, which holds no model, or no JSON object."""
    try:
        config = read_object(path / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={str(path)!r}: its config.json is damaged ({error}); fetch the model again") from error
    if config.get("mode") == "eval":
        raise UserError(f"{key}={str(path)!r} is an evaluation, which holds no model: name what was evaluated")
    if "task_name" in config:
        raise UserError(
            f"{key}={str(path)!r} is a run without a result (no adapter/): finish it with resume=true, or name rounds/<n>/adapter in it"
        )


def base_of_adapter(adapter: Path) -> str:
    """Gives base_model_name_or_path of a PEFT folder. Raises UserError where its config is no JSON or names none."""
    try:
        name = read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{adapter / 'adapter_config.json'} is damaged ({error}): copy the adapter folder again"
        ) from error
    if not name or not isinstance(name, str):
        raise UserError(
            f"{adapter / 'adapter_config.json'} names no base: give pretrained_model_name_or_path=BASE and this folder as lora_model_path"
        )
    return name


def run_of(adapter: Path | None) -> Path | None:
    """Gives the run's folder that an adapter lies in (run/adapter or run/rounds/<n>/adapter), or None."""
    if adapter is None:
        return None
    folder = adapter.resolve()
    return next((parent for parent in list(folder.parents)[:3] if (parent / "partition.json").is_file()), None)


def find_base(name: str, pocket_dir: Path, key: str) -> Path:
    """Gives the folder of a full model on this disk: a path, `pocket:SEED` (built on first use) or a hub id (fetched or from the cache)."""
    pocket = named_pocket(name, pocket_dir)
    if pocket is not None:
        return pocket.model
    path = Path(name).expanduser()
    if path.is_dir():
        if adapter_folder(path, key) is not None:
            raise UserError(f"{key}: {name!r} is an adapter, where a full model is wanted")
        return path
    if not HUB_ID.match(name) or name.startswith("."):
        raise UserError(f"{key}={name!r} does not exist: give a folder that does, a hub id (owner/name) or pocket:SEED")
    return _fetch(name, key)


def _fetch(name: str, key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"], etag_timeout=5
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{key}={name!r} is no folder here, and the model hub did not give it ({type(error).__name__}): "
            "check the name, the network (HF_HUB_OFFLINE must not be 1) and your access token, or name a local folder"
        ) from error
    return Path(folder)
