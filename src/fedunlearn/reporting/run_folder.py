"""A run's folder: where it lies, what may be done to one that exists, and the files every run writes."""

import hashlib
import logging
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from fedunlearn.config.data import FOLDER_OF_MODE
from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.errors import UserError
from fedunlearn.files import canonical_json, disk_fault, read_object, whole_folder, write_bytes, write_json

log = logging.getLogger(__name__)
PACKAGES = (
    "fedunlearn",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "flwr",
    "datasets",
    "safetensors",
    "rouge-score",
    "scipy",
)
DONE = "done.json"
CONTROLS = ("resume", "overwrite", "launcher", "paths")
"""Keys that say how a run is carried out and leave its result alone."""


def run_path(run: TrainRun | EvalRun) -> Path:
    """saves/<finetune|unlearn|eval>/<task_name>."""
    return Path(run.paths.saves_dir) / FOLDER_OF_MODE[run.mode] / run.task_name


def judge_folder(run: TrainRun | EvalRun, plain: Mapping[str, object]) -> None:
    """Says whether a run may begin in its folder; changes nothing.

    Another config needs overwrite=true. The same config goes on with resume=true; finished, it is repeated from the start,
    which one log line says. Raises UserError where neither is said, or there is nothing to resume.
    """
    _check_folder(run, plain)
    folder = run_path(run)
    if is_done(folder) and not run.resume and not run.overwrite:
        log.warning("%s holds a finished run of this very config: it is repeated from the start", folder)


def check_folders(runs: Iterable[tuple[TrainRun | EvalRun, Mapping[str, object]]]) -> None:
    """Judges the folders of several runs, each with its plain config, and says nothing. Raises UserError with the faults of all."""
    faults: list[str] = []
    for run, plain in runs:
        try:
            _check_folder(run, plain)
        except UserError as error:
            faults += error.faults
    if faults:
        raise UserError(*faults)


def _check_folder(run: TrainRun | EvalRun, plain: Mapping[str, object]) -> None:
    folder = run_path(run)
    if folder_exists(folder) and not run.overwrite:
        _judge(folder, plain, run.resume)
        if run.resume and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"resume=true, but {str(folder)!r} may not be written: mend the rights there, or choose another task_name"
            )
    elif run.resume:
        raise UserError(
            f"resume=true, but {str(folder)!r} does not exist: leave resume out, or correct task_name or paths.saves_dir"
        )


def is_done(folder: Path) -> bool:
    """Whether a run in this folder came to its end."""
    return (folder / DONE).is_file()


def make_folder(
    run: TrainRun | EvalRun, plain: Mapping[str, object], text: str, fill: Callable[[Path], None] | None = None
) -> Path:
    """Makes the folder that judge_folder allowed, with config.yaml, config.json and what `fill` writes; with resume=true it stays as it is.

    All in one rename: where the disk is full, the folder is as it was before (the old run, or nothing).
    """
    folder = run_path(run)
    if run.resume:
        return folder
    with whole_folder(folder) as temporary:
        write_bytes(temporary / "config.yaml", text.encode("utf-8"))
        write_json(temporary / "config.json", plain)
        if fill is not None:
            fill(temporary)
    return folder


def folder_exists(folder: Path) -> bool:
    """Whether the folder exists. Raises UserError where it never can: a file in its place, a name too long, no right to write."""
    try:
        if folder.is_dir():
            return True
        taken = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        if not taken.is_dir():
            raise UserError(
                f"{str(folder)!r} cannot be made, for {str(taken)!r} is a file: choose another task_name or paths.saves_dir"
            )
        folder.with_name(f".{folder.name}.tmp{os.getpid()}").exists()
    except OSError as error:
        raise disk_fault(error, folder) from error
    if not os.access(taken, os.W_OK | os.X_OK):
        raise UserError(
            f"{str(folder)!r} cannot be made, for {str(taken)!r} may not be written: choose another paths.saves_dir"
        )
    return False


def _judge(folder: Path, plain: Mapping[str, object], resume: bool) -> None:
    saved = folder / "config.json"
    if not saved.is_file():
        if any(folder.iterdir()):
            raise UserError(
                f"{str(folder)!r} exists and is no run of ours: choose another task_name, or empty it with overwrite=true"
            )
        if resume:
            raise UserError(f"resume=true, but {str(folder)!r} is empty: leave resume out")
        return
    changed = changed_keys(_saved_config(saved), plain)
    if changed:
        raise UserError(
            f"{str(folder)!r} was made with another config (differs in {', '.join(changed[:8])}): "
            "choose another task_name, or overwrite=true to start anew in its place"
        )
    if resume:
        return
    if not is_done(folder):
        goes_on = "" if plain.get("door") == "central" else "resume=true goes on, "
        raise UserError(f"{str(folder)!r} holds an unfinished run of this config: {goes_on}overwrite=true starts anew")


def _saved_config(path: Path) -> Mapping[str, object]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{str(path)!r} is damaged ({why}): choose another task_name, or overwrite=true to start anew in its place"
    )


def changed_keys(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Gives the dotted keys in which two configs differ, leaving out those that only control how a run is carried out."""
    flat_old, flat_new = _flat(old), _flat(new)
    keys = sorted(set(flat_old) | set(flat_new))
    return [key for key in keys if _counts(key) and flat_old.get(key) != flat_new.get(key)]


def _counts(key: str) -> bool:
    """Whether a key can change a result; of the launcher the threads can, in the last bits."""
    return key.split(".")[0] not in CONTROLS or key == "launcher.threads"


def _flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def provenance(run: TrainRun | EvalRun, hashes: Mapping[str, str]) -> dict[str, object]:
    """Gives what a result was made with: versions, git commit, hashes of data and models, seed, hardware."""
    return {
        "versions": versions(PACKAGES),
        "git_commit": _git_commit(),
        "hashes": dict(hashes),
        "seed": run.trainer.args.seed if isinstance(run, TrainRun) else None,
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Gives the versions of Python and of installed packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _git_commit() -> str | None:
    """The commit of the source tree, `-dirty` where files changed; None where this is no git checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("no git commit to record: %s", error)
        return None
    return commit.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")


def config_hash(plain: Mapping[str, object]) -> str:
    """sha256 of the config without the keys that only control how a run is carried out."""
    kept = {key: value for key, value in _flat(plain).items() if _counts(key)}
    return hashlib.sha256(canonical_json(kept).encode()).hexdigest()
