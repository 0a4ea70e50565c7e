"""A checkpoint a round: the global adapter, the server optimiser's moments, and who holds the reference."""

import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from fedunlearn.aggregation.base import ServerState
from fedunlearn.errors import UserError
from fedunlearn.files import append_line, canonical_json, whole_folder, write_bytes, write_json
from fedunlearn.models.adapter_files import load_adapter, save_adapter
from fedunlearn.records.adapter import Adapter

log = logging.getLogger(__name__)
HISTORY = "history.jsonl"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What resume needs. Random numbers need nothing: every draw is a function of (seed, round, client)."""

    state: ServerState
    holders: frozenset[int] = frozenset()


def round_folder(run_folder: Path, round: int) -> Path:
    """rounds/0003 of a run's folder."""
    return run_folder / "rounds" / f"{round:04d}"


def save_checkpoint(run_folder: Path, checkpoint: Checkpoint, start: Adapter, keep: int) -> None:
    """Writes rounds/<n>/ in one rename, then deletes all but the newest `keep`.

    start: gives the PEFT config and base of the adapter. Raises UserError where the disk is full; earlier rounds stay.
    """
    state = checkpoint.state
    with whole_folder(round_folder(run_folder, state.round)) as folder:
        save_adapter(folder / "adapter", start.replace(state.adapter))
        if state.moments:
            flat = {
                f"{moment}/{name}": tensor
                for moment, tensors in state.moments.items()
                for name, tensor in tensors.items()
            }
            write_bytes(folder / "moments.safetensors", safetensors.torch.save(flat))
        write_json(
            folder / "checkpoint.json",
            {"round": state.round, "holders": sorted(checkpoint.holders), "moments": sorted(state.moments)},
        )
    for old in _rounds(run_folder)[:-keep]:
        shutil.rmtree(old)


def _rounds(run_folder: Path) -> list[Path]:
    return sorted(path for path in (run_folder / "rounds").glob("[0-9]*") if path.is_dir())


def latest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """Reads the newest round on disk; None where there is none. Raises UserError where it is damaged."""
    rounds = _rounds(run_folder)
    if not rounds:
        return None
    folder = rounds[-1]
    try:
        adapter, _ = load_adapter(folder / "adapter")
        saved = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        flat = safetensors.torch.load_file(folder / "moments.safetensors") if saved["moments"] else {}
        moments = {
            name: {key.partition("/")[2]: t for key, t in flat.items() if key.startswith(f"{name}/")}
            for name in saved["moments"]
        }
        state = ServerState(adapter=adapter.tensors, moments=moments, round=int(saved["round"]))
        return Checkpoint(state=state, holders=frozenset(saved["holders"]))
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise UserError(
            f"checkpoint {str(folder)!r} is damaged ({error}): delete that folder, resume=true then goes on from the round before"
        ) from error


def append_history(run_folder: Path, line: object) -> None:
    """Appends one JSON line to history.jsonl."""
    append_line(run_folder / HISTORY, canonical_json(line))


def read_history(run_folder: Path) -> list[dict[str, object]]:
    """Reads history.jsonl, one object a round; empty where there is none yet. A last line that was cut off by a kill is left out."""
    path = run_folder / HISTORY
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def cut_history(run_folder: Path, last_round: int) -> None:
    """Drops lines of rounds after `last_round`: a stop may fall between a checkpoint and its line, or after a line that has no checkpoint."""
    kept: Iterable[dict[str, object]] = [
        line for line in read_history(run_folder) if int(str(line["round"])) <= last_round
    ]
    text = "".join(canonical_json(line) + "\n" for line in kept)
    write_bytes(run_folder / HISTORY, text.encode("utf-8"))
