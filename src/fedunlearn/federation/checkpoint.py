"""A checkpoint a round: the global adapter, what the server keeps beside it, and which parts each client holds."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

import fedunlearn
from fedunlearn.aggregation.adalora import Importance, grouped
from fedunlearn.aggregation.base import ServerState
from fedunlearn.errors import UserError
from fedunlearn.federation.block_store import FOLDER, BlockStore
from fedunlearn.federation.flower_strategy import StrategyState
from fedunlearn.federation.start import began_with
from fedunlearn.files import append_line, canonical_json, flush_tree, read_object, whole_folder, write_bytes, write_json
from fedunlearn.methods.tokens import Memory
from fedunlearn.models.adapter_files import read_folder, save_adapter
from fedunlearn.models.source import FACTORS
from fedunlearn.records.adapter import Adapter, Tensors, hash_tensors

log = logging.getLogger(__name__)
HISTORY = "history.jsonl"
FORMAT = 1
"""What a checkpoint.json of this version is written in; a later one is not read."""
ADAPTER = "adapter"
_DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError)
MOMENTS, CARRIED, FOREIGN, HELD, IMPORTANCE = (
    "moments.safetensors",
    "carried.safetensors",
    "strategy.safetensors",
    "held.safetensors",
    "importance.safetensors",
)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Whose round it was, and where the files stood that grow from round to round. request: the request's hash.

    history: bytes of history.jsonl in front of the round's own line. ledger: hash of the ledger's last line; empty where none is kept.
    """

    run_id: str
    request: str
    history: int
    ledger: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """What resume needs. Random numbers need nothing: every draw is a function of (seed, round, client).

    strategy: the class that made the state. blocks: hashes of the side-car in <run>/sidecar/. carried: error feedback. holds: client ->
    parts it keeps. memories: client -> what its method remembers. held: updates that a
    server-side method keeps for the next round. foreign: the state of a Flower strategy. importance: what AdaLoRA's server remembers of ranks. standing: None before
    a run's first round.
    """

    state: ServerState
    strategy: str
    blocks: tuple[str, ...] = ()
    carried: Tensors = field(default_factory=dict)
    holds: Mapping[int, frozenset[str]] = field(default_factory=dict)
    memories: Mapping[int, Memory] = field(default_factory=dict)
    held: Mapping[int, Tensors] = field(default_factory=dict)
    foreign: StrategyState | None = None
    importance: Importance = field(default_factory=Importance)
    standing: Standing | None = None

    @property
    def adapter_hash(self) -> str:
        """Names the global adapter of this round: the hash of its factors, with those of the side-car's blocks where there are some."""
        own = hash_tensors(self.state.adapter)
        return hashlib.sha256(" ".join((own, *self.blocks)).encode()).hexdigest() if self.blocks else own


def round_folder(run_folder: Path, round: int) -> Path:
    """rounds/0003 of a run's folder."""
    return run_folder / "rounds" / f"{round:04d}"


def save_checkpoint(
    run_folder: Path,
    checkpoint: Checkpoint,
    start: Adapter,
    keep: int | Literal["all"],
    written: Callable[[], None] | None = None,
) -> None:
    """Writes rounds/<n>/ in one rename, then deletes all but the newest `keep`, and side-car blocks that none of them names.

    The adapter lies in adapter/; beside a side-car its factors alone are no result, and lie in factors/. start: gives the PEFT config and
    base. written: called when all of it is on the disk, before the rename makes the round a whole one. Raises UserError where the disk is full;
    earlier rounds stay.
    """
    state = checkpoint.state
    with whole_folder(round_folder(run_folder, state.round)) as folder:
        save_adapter(folder / (FACTORS if checkpoint.blocks else ADAPTER), start.replace(state.adapter, {}))
        foreign = checkpoint.foreign or StrategyState()
        files = {}
        for file, tensors in (
            (MOMENTS, _flat(state.moments)),
            (CARRIED, checkpoint.carried),
            (FOREIGN, foreign.arrays),
            (HELD, _flat(checkpoint.held)),
            (IMPORTANCE, _flat(grouped(checkpoint.importance))),
        ):
            if tensors:
                blob = safetensors.torch.save({k: t.contiguous() for k, t in tensors.items()})
                write_bytes(folder / file, blob)
                files[file] = hashlib.sha256(blob).hexdigest()
        write_json(folder / "checkpoint.json", {**_described(checkpoint), "files": files})
        if written is not None:
            flush_tree(folder)
            written()
    for old in [] if keep == "all" else _rounds(run_folder)[:-keep]:
        shutil.rmtree(old)
    if checkpoint.blocks:
        named = {name for path in _rounds(run_folder) for name in _blocks(path)}
        BlockStore(run_folder / FOLDER).drop_all_but({*named, *began_with(run_folder)})


def _described(checkpoint: Checkpoint) -> dict[str, object]:
    foreign, standing = checkpoint.foreign, checkpoint.standing
    return {
        "format": FORMAT,
        "version": fedunlearn.__version__,
        "standing": None if standing is None else asdict(standing),
        "round": checkpoint.state.round,
        "adapter_hash": checkpoint.adapter_hash,
        "strategy": checkpoint.strategy,
        "moments": sorted(checkpoint.state.moments),
        "blocks": list(checkpoint.blocks),
        "carried": bool(checkpoint.carried),
        "holds": {str(client): sorted(names) for client, names in sorted(checkpoint.holds.items())},
        "memories": {str(client): dict(kept) for client, kept in sorted(checkpoint.memories.items())},
        "foreign": None if foreign is None else {"kinds": foreign.kinds, "unsaved": list(foreign.unsaved)},
    }


def _rounds(run_folder: Path) -> list[Path]:
    return sorted(
        (path for path in (run_folder / "rounds").glob("[0-9]*") if path.is_dir()), key=lambda path: int(path.name)
    )


def latest_checkpoint(run_folder: Path) -> Checkpoint | None:
    """Reads the newest round on disk; None where there is none. Raises UserError where it is damaged."""
    rounds = _rounds(run_folder)
    return read_checkpoint(rounds[-1]) if rounds else None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads one round's folder. Raises UserError where it is damaged, or of a format that this version does not know."""
    try:
        saved = read_object(folder / "checkpoint.json")
        number, version = saved["format"], saved["version"]
        if type(number) is not int or number <= FORMAT:
            return _read(folder, saved)
    except _DAMAGES as error:
        raise damaged(folder, error) from error
    raise UserError(
        f"checkpoint {str(folder)!r} has format {number}, written by fedunlearn {version}; this is fedunlearn {fedunlearn.__version__}, which reads "
        f"formats up to {FORMAT}: go on with that version, or start anew with overwrite=true"
    )


def damaged(folder: Path, why: object) -> UserError:
    """The message of a checkpoint that is not what a round wrote."""
    return UserError(
        f"checkpoint {str(folder)!r} is damaged ({why}): delete that folder, resume=true then goes on from the round before"
    )


def _read(folder: Path, saved: Mapping[str, Any]) -> Checkpoint:
    _check_values(saved, int(folder.name))
    adapter, _ = read_folder(folder / (FACTORS if saved["blocks"] else ADAPTER))
    tensors = {file: _tensors(folder, saved["files"], file) for file in (MOMENTS, CARRIED, FOREIGN, HELD, IMPORTANCE)}
    foreign = saved["foreign"]
    found = Checkpoint(
        state=ServerState(
            adapter=adapter.tensors, moments=_moments(tensors[MOMENTS], saved["moments"]), round=saved["round"]
        ),
        strategy=saved["strategy"],
        blocks=tuple(saved["blocks"]),
        carried=tensors[CARRIED],
        holds={int(client): frozenset(names) for client, names in saved["holds"].items()},
        held={int(client): kept for client, kept in _grouped(tensors[HELD]).items()},
        memories={
            int(client): {name: float(value) for name, value in kept.items()}
            for client, kept in saved["memories"].items()
        },
        foreign=None
        if foreign is None
        else StrategyState(arrays=tensors[FOREIGN], kinds=foreign["kinds"], unsaved=tuple(foreign["unsaved"])),
        importance=Importance(**_grouped(tensors[IMPORTANCE])),
        standing=None if saved["standing"] is None else Standing(**saved["standing"]),
    )
    if found.adapter_hash != saved["adapter_hash"] or bool(found.carried) != saved["carried"]:
        raise ValueError("adapter_hash and carried in checkpoint.json are not what lies beside it")
    return found


def _check_values(saved: Mapping[str, Any], number: int) -> None:
    """Raises KeyError for a key that is missing, ValueError for a value that no round writes."""
    foreign = saved["foreign"]
    holds = {
        "format": saved["format"] == FORMAT and type(saved["format"]) is int,
        "standing": saved["standing"] is None or _is_standing(saved["standing"]),
        "round": saved["round"] == number and type(saved["round"]) is int and number > 0,
        "strategy": isinstance(saved["strategy"], str),
        "moments": _are_texts(saved["moments"]),
        "blocks": _are_texts(saved["blocks"]),
        "carried": isinstance(saved["carried"], bool),
        "holds": isinstance(saved["holds"], dict)
        and all(key.isdecimal() and _are_texts(names) for key, names in saved["holds"].items()),
        "memories": isinstance(saved["memories"], dict),
        "foreign": foreign is None
        or (isinstance(foreign, dict) and isinstance(foreign["kinds"], dict) and _are_texts(foreign["unsaved"])),
        "files": isinstance(saved["files"], dict),
    }
    wrong = [key for key, fits in holds.items() if not fits]
    if wrong:
        raise ValueError(f"checkpoint.json holds {wrong[0]}={str(saved[wrong[0]])[:80]}, which no round writes")


def _is_standing(saved: Mapping[str, Any]) -> bool:
    texts = (saved["run_id"], saved["request"], saved["ledger"])
    return type(saved["history"]) is int and saved["history"] >= 0 and all(isinstance(text, str) for text in texts)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _tensors(folder: Path, hashes: Mapping[str, object], file: str) -> Tensors:
    """Gives what a file holds, nothing where none was written. Raises ValueError where it is not the one that was written."""
    path = folder / file
    if file not in hashes:
        if path.is_file():
            raise ValueError(f"{file} was not written by that round")
        return {}
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != hashes[file]:
        raise ValueError(f"{file} is not the one that was written: its sha256 differs")
    tensors: Tensors = safetensors.torch.load(blob)
    return tensors


def _moments(flat: Tensors, names: list[str]) -> dict[str, Tensors]:
    found = _grouped(flat)
    if sorted(found) != names:
        raise ValueError(f"checkpoint.json holds moments={names}, {MOMENTS} holds {sorted(found)}")
    return {name: found[name] for name in names}


def _flat(groups: Mapping[Any, Tensors]) -> dict[str, torch.Tensor]:
    return {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}


def _grouped(flat: Tensors) -> dict[str, Tensors]:
    """Undoes names such as `v/lora_A` (moment, or client, before the first slash)."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        found.setdefault(group, {})[name] = tensor
    return dict(found)


def _blocks(folder: Path) -> list[str]:
    try:
        return [str(name) for name in read_object(folder / "checkpoint.json")["blocks"]]
    except _DAMAGES as error:
        raise damaged(folder, error) from error


def history_size(run_folder: Path) -> int:
    """Gives the bytes of history.jsonl, 0 where there is none."""
    path = run_folder / HISTORY
    return path.stat().st_size if path.is_file() else 0


def append_history(run_folder: Path, line: object) -> None:
    """Appends one JSON line to history.jsonl."""
    append_line(run_folder / HISTORY, canonical_json(line))


def read_history(run_folder: Path) -> list[dict[str, object]]:
    """Reads history.jsonl, one object a round; empty where there is none yet. A last line that was cut off by a kill is left out.

    Raises UserError where it is damaged.
    """
    path = run_folder / HISTORY
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged ({error}): make that run anew with overwrite=true") from error


def cut_history(run_folder: Path, last_round: int) -> None:
    """Drops lines of rounds after `last_round`: a stop may fall between a checkpoint and its line, or after a line that has no checkpoint."""
    kept: Iterable[dict[str, object]] = [
        line for line in read_history(run_folder) if int(str(line["round"])) <= last_round
    ]
    text = "".join(canonical_json(line) + "\n" for line in kept)
    write_bytes(run_folder / HISTORY, text.encode("utf-8"))
