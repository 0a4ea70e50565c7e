"""A run's result from the server's machine: its history, records and adapter, whole or not at all."""

import posixpath
import shlex
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from fedunlearn.config.data import FOLDER_OF_MODE
from fedunlearn.errors import UserError, did_you_mean
from fedunlearn.files import whole_folder
from fedunlearn.sites.running import tell

_WANTED = "*.json *.jsonl *.yaml adapter"
"""What is copied; rounds, ledger and side-car stay where resume needs them."""


def fetch_run(site: str, task: str, to: Path, ssh: str | None = None) -> Path:
    """Copies what there is of a run into `to`/<task name>; gives that folder.

    site: the server's YAML; with `ssh` ([user@]host) its path on that machine. task: the run's name, or kind/name (unlearn/name) where several kinds have
    one. Raises UserError where the machine, the site or the run cannot be had, or the folder is there already.
    """
    root = _saves_root(site, ssh)
    run = _one_run(task, _runs(root, ssh), root)
    target = to / posixpath.basename(run)
    if target.exists():
        raise UserError(f"--to: {target} exists already: take it away, or give another folder")
    with whole_folder(target) as folder:
        _copy(posixpath.join(root, run), folder, ssh)
        complete = (folder / "adapter").is_dir()
    if not complete:
        tell(f"{run} has no adapter/ yet: it is running or was interrupted; its history so far is there")
    return target


def _saves_root(site: str, ssh: str | None) -> str:
    try:
        held = yaml.safe_load(_output(f"cat -- {shlex.quote(site)}", ssh, f"{site} cannot be read"))
    except yaml.YAMLError as error:
        raise UserError(f"{site} is no valid YAML: {' '.join(str(error).split())}") from error
    root = held.get("saves_root") if isinstance(held, dict) else None
    if not isinstance(root, str):
        raise UserError(f"{site} names no saves_root: give the YAML of the server's site")
    if root.startswith("~/"):  # the home there, not here
        root = _output('printf %s "$HOME"', ssh, "the home folder cannot be read") + root[1:]
    return posixpath.join(posixpath.dirname(site), root)


def _runs(root: str, ssh: str | None) -> list[str]:
    """kind/name of every run."""
    listed = _output(f"cd -- {shlex.quote(root)} && ls -d -- */*/ 2>/dev/null || true", ssh, f"{root} cannot be read")
    return [line.rstrip("/") for line in listed.splitlines() if line.split("/")[0] in FOLDER_OF_MODE.values()]


def _one_run(task: str, runs: Sequence[str], root: str) -> str:
    found = [run for run in runs if task in (run, posixpath.basename(run))]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{task!r} is the name of {' and '.join(found)}: give one of these")
    names = [posixpath.basename(run) for run in runs]
    known = f"Known: {', '.join(sorted(runs))}" if runs else "No run is there"
    raise UserError(f"{task!r} is no run in {root}{did_you_mean(task, names) or '.'} {known}")


def _copy(run: str, folder: Path, ssh: str | None) -> None:
    script = f"cd -- {shlex.quote(run)} && tar -cf - -- $(ls -d -- {_WANTED} 2>/dev/null)"
    with subprocess.Popen(
        _words(script, ssh), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                archive.extractall(folder, filter="data")
        except tarfile.TarError as error:
            said = process.stderr.read().decode(errors="replace").strip()
            raise UserError(f"{run} cannot be copied: {said or error}") from error
        said = process.stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise UserError(f"{run} cannot be copied (code {process.returncode}): {said}")


def _output(script: str, ssh: str | None, fault: str) -> str:
    done = subprocess.run(_words(script, ssh), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        where = f" on {ssh}" if ssh else ""
        raise UserError(f"{fault}{where}: {done.stderr.strip() or f'code {done.returncode}'}")
    return done.stdout


def _words(script: str, ssh: str | None) -> list[str]:
    return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", ssh, script] if ssh else ["sh", "-c", script]
