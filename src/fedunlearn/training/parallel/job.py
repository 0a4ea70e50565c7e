"""What goes to the processes of a client and what comes back: JSON and safetensors, never pickle."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from multiprocessing.connection import Connection
from typing import Any, cast

import safetensors.torch
import torch

from fedunlearn.config.components import component_class
from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.reading import TARGET, Reader
from fedunlearn.config.trainer import GuardArgs, TrainArgs
from fedunlearn.data.chat import EncodedRow
from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method
from fedunlearn.methods.tokens import Need
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientTask, Role, Share, Trained
from fedunlearn.training.local import LocalSettings
from fedunlearn.training.loop import Tally, Work
from fedunlearn.training.steps import MicroBatch, Step

START, SIDECAR, REFERENCE, REFERENCE_SIDECAR = "start", "sidecar", "reference", "reference_sidecar"


@dataclass(frozen=True, eq=False)
class Frame:
    """One message either way. said: JSON values. tensors: by name, on the CPU; empty where there are none."""

    said: Mapping[str, Any]
    tensors: Tensors


def send(pipe: Connection, frame: Frame) -> None:
    """Writes a frame: two pieces, JSON and safetensors."""
    pipe.send_bytes(json.dumps(frame.said).encode())
    apart = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in frame.tensors.items()}
    pipe.send_bytes(safetensors.torch.save(apart))  # it refuses tensors that share storage


def receive(pipe: Connection) -> Frame:
    """Reads a frame. Raises EOFError where the other end is gone."""
    said = json.loads(pipe.recv_bytes())
    return Frame(said, safetensors.torch.load(pipe.recv_bytes()))


def parts_of(tensors: Tensors, part: str) -> Tensors:
    """Gives the tensors of one part of a frame, by their own names."""
    return {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}


def named(part: str, tensors: Tensors) -> Tensors:
    """Gives tensors under the names that they have as one part of a frame."""
    return {f"{part}/{name}": tensor for name, tensor in tensors.items()}


def pack_rows(rows: Sequence[EncodedRow]) -> list[tuple[Sequence[int], int]]:
    """Gives rows as JSON values."""
    return [(row.input_ids, row.num_prompt) for row in rows]


def unpack_rows(rows: Sequence[Sequence[Any]]) -> tuple[EncodedRow, ...]:
    """Gives rows back."""
    return tuple(EncodedRow(tuple(ids), num_prompt) for ids, num_prompt in rows)


def pack_work(work: Work, steps: Sequence[Step]) -> dict[str, object]:
    """Gives as JSON values what the steps read beside tensors: task, settings, rows, plan, and of alternates and reference sums those that the plan meets."""
    others = _others(work, steps)
    return {
        "task": asdict(work.task),
        "settings": _pack_settings(work.settings),
        "forget": pack_rows(work.data.forget),
        "retain": pack_rows(work.data.retain),
        "others": [(*key, *packed) for key, packed in zip(others, pack_rows(tuple(others.values())), strict=True)],
        "sums": _sums(work, steps, tuple(others.values())),
        "steps": [[(part.rows, part.retain, part.alternates) for part in step] for step in steps],
    }


def _others(work: Work, steps: Sequence[Step]) -> dict[tuple[int, int], EncodedRow]:
    """The alternates that the plan meets, by (row, which of its alternates)."""
    if work.data.alternates is None:
        return {}
    met = {pair for step in steps for part in step for pair in zip(part.rows, part.alternates, strict=False)}
    return {pair: work.data.alternates.encode(*pair) for pair in sorted(met)}


def _sums(work: Work, steps: Sequence[Step], others: Sequence[EncodedRow]) -> dict[str, float]:
    sums, method = work.data.reference, work.method
    if sums is None or method is None or Need.REFERENCE_SUMS not in method.needs | method.retain_needs:
        return {}
    rows = [work.rows[index] for index in sorted({index for step in steps for part in step for index in part.rows})]
    rows += others if Need.ALTERNATES in method.needs else []
    return dict(zip((row.hash for row in rows), sums.of(rows).tolist(), strict=True))


def _pack_settings(settings: LocalSettings) -> dict[str, object]:
    method = settings.method
    return {
        "args": asdict(settings.args),
        "collator": asdict(settings.collator),
        "guard": asdict(settings.guard),
        "method": None if method is None else _pack_method(method),
    }


def _pack_method(method: Method) -> dict[str, object]:
    kind = type(method)
    known = {field.name: getattr(method, field.name) for field in fields(cast("Any", method)) if field.init}
    return {TARGET: f"{kind.__module__}.{kind.__qualname__}", **known}


def unpack_settings(said: Mapping[str, Any]) -> LocalSettings:
    """Gives the settings back. Raises UserError for a method that this process cannot import."""
    method = said["method"]
    return LocalSettings(
        args=TrainArgs(**said["args"]),
        collator=CollatorConfig(**said["collator"]),
        guard=GuardArgs(**said["guard"]),
        method=None if method is None else _unpack_method(method),
    )


def _unpack_method(said: Mapping[str, Any]) -> Method:
    found = component_class(said[TARGET], Method, "method._target_")
    if isinstance(found, str):
        raise UserError(found)
    reader = Reader()
    method = reader.record(found, {name: value for name, value in said.items() if name != TARGET}, "method")
    if reader.faults:
        raise UserError(*reader.faults)
    return cast("Method", method)


def unpack_task(said: Mapping[str, Any]) -> ClientTask:
    """Gives the task back."""
    known = {**said, "role": Role(said["role"]), "trained": Trained(said["trained"]), "share": Share(**said["share"])}
    return ClientTask(**known)


def unpack_steps(said: Sequence[Sequence[Sequence[Sequence[int]]]]) -> tuple[Step, ...]:
    """Gives the plan back."""
    return tuple(tuple(MicroBatch(*(tuple(numbers) for numbers in part)) for part in step) for step in said)


def pack_tally(tally: Tally) -> dict[str, object]:
    """Gives a tally as JSON values; losses that are no number are told as such."""
    return {
        "memory": dict(tally.memory),
        "losses": tally.losses,
        "tokens": tally.tokens,
        "reference_tokens": tally.reference_tokens,
        "trained": sorted(tally.trained),
        "stopped": tally.stopped,
    }


def unpack_tally(said: Mapping[str, Any]) -> Tally:
    """Gives the tally back."""
    return Tally(**{**said, "trained": set(said["trained"])})


class ToldSums:
    """Reference sums that another process has computed, in the place of training.reference.ReferenceSums."""

    def __init__(self, sums: Mapping[str, float]) -> None:
        self._sums = sums

    def of(self, rows: Sequence[EncodedRow]) -> torch.Tensor:
        """Gives the sums of rows, [B] float32. Raises KeyError for one that was not told."""
        return torch.tensor([self._sums[row.hash] for row in rows], dtype=torch.float32)
