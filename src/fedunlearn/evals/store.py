"""What the passes of an evaluation found, on disk under what it depends on: scores, texts and gradient norms that are there are not computed again."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedunlearn.data.chat import EncodedRow
from fedunlearn.errors import UserError
from fedunlearn.files import canonical_json, write_bytes, write_json
from fedunlearn.records.evaluation import AnswerScore, Detail, TokenScores

log = logging.getLogger(__name__)
Ids = tuple[int, ...]
T = TypeVar("T")
R = TypeVar("R")
SEAL = "sha256"
COLUMNS = ("logp", "hit", "mu", "sigma2")


@dataclass(frozen=True)
class EvalStore:
    """The numbers of one model on rows and prompts. folder: made of all that they depend on (None: kept nowhere); each call of a pass leaves one file in it."""

    folder: Path | None

    def scores(
        self,
        wanted: Mapping[EncodedRow, Detail],
        work: Callable[[Mapping[EncodedRow, Detail]], Mapping[EncodedRow, AnswerScore]],
    ) -> dict[EncodedRow, AnswerScore]:
        """Gives the scores of all rows; `work` computes those that are not known in that detail."""
        found = {row: self._scores[row.hash] for row in wanted if row.hash in self._scores}
        found = {row: score for row, score in found.items() if _detail(score) >= wanted[row]}
        lacking = {row: detail for row, detail in wanted.items() if row not in found}
        if lacking:
            new = work(lacking)
            self._scores.update({row.hash: score for row, score in new.items()})
            if self.folder is not None:
                _write_scores(self.folder, new)
            found |= new
        return found

    def texts(
        self, name: str, prompts: Sequence[Ids], work: Callable[[Sequence[Ids]], Sequence[str]]
    ) -> dict[Ids, str]:
        """Gives the continuation of each prompt. name: of the settings that texts depend on."""
        return self._kept(f"texts-{name}", {_hash(prompt): prompt for prompt in prompts}, work)

    def gradnorms(
        self, name: str, rows: Sequence[EncodedRow], work: Callable[[Sequence[EncodedRow]], Sequence[float]]
    ) -> dict[EncodedRow, float]:
        """Gives the gradient norm of each row. name: of the settings that norms depend on."""
        return self._kept(f"gradnorms-{name}", {row.hash: row for row in rows}, work)

    def _kept(
        self,
        kind: str,
        wanted: Mapping[str, T],
        work: Callable[[Sequence[T]], Sequence[R]],
    ) -> dict[T, R]:
        known = self._values.setdefault(kind, self._read_values(kind))
        lacking = [name for name in wanted if name not in known]
        if lacking:
            new = dict(zip(lacking, work([wanted[name] for name in lacking]), strict=True))
            known |= new
            if self.folder is not None:
                write_json(self.folder / kind / f"{_hash(sorted(new))}.json", {SEAL: _hash(new), "values": new})
        return {one: known[name] for name, one in wanted.items()}

    def _read_values(self, kind: str) -> dict[str, Any]:
        known: dict[str, Any] = {}
        for path in sorted((self.folder / kind).glob("*.json")) if self.folder is not None else ():
            known |= _guarded(path, _read_json)
        return known

    @cached_property
    def _values(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def _scores(self) -> dict[str, AnswerScore]:
        known: dict[str, AnswerScore] = {}
        for path in sorted((self.folder / "scores").glob("*.safetensors")) if self.folder is not None else ():
            known |= _guarded(path, _read_scores)
        return known


def _hash(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _guarded(path: Path, read: Callable[[Path], dict[str, T]]) -> dict[str, T]:
    """Gives what a file holds, nothing where it is not the one that was written. Raises UserError where something else stands in its place."""
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        log.warning("%s is damaged (%s): what stood in it is computed anew", path, error)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{str(path)!r} is no file of this cache and cannot be taken away ({error.strerror or error}): delete it, or choose another paths.cache_dir"
        ) from error
    return {}


def _sealed(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 of arrays by name: what is read must be what was written."""
    seal = hashlib.sha256()
    for name in sorted(tensors):
        seal.update(f"{name} {tensors[name].dtype} {tensors[name].shape} ".encode())
        seal.update(np.ascontiguousarray(tensors[name]).tobytes())
    return seal.hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    saved = json.loads(path.read_text(encoding="utf-8"))
    values: dict[str, Any] = saved["values"]
    if saved[SEAL] != _hash(values):
        raise ValueError("its seal is not that of its content")
    return values


def _detail(score: AnswerScore) -> Detail:
    if score.tokens is None:
        return Detail.LOSS
    return Detail.TOKENS if score.tokens.mu is None else Detail.MOMENTS


def _write_scores(folder: Path, scores: Mapping[EncodedRow, AnswerScore]) -> None:
    """One file a detail: `names` of the rows [K, 32] bytes, avg_loss, prob, num_labels [K], and the labels' columns one row after another."""
    for detail in Detail:
        chosen = {row.hash: score for row, score in scores.items() if _detail(score) == detail}
        if not chosen:
            continue
        tensors = {
            "names": np.frombuffer(bytes.fromhex("".join(chosen)), dtype=np.uint8).reshape(-1, 32),
            "avg_loss": np.array([score.avg_loss for score in chosen.values()]),
            "prob": np.array([score.prob for score in chosen.values()]),
            "num_labels": np.array([score.num_labels for score in chosen.values()]),
        }
        for column in COLUMNS[: 2 * detail]:
            tensors[column] = np.concatenate([getattr(score.tokens, column) for score in chosen.values()])
        blob = save(tensors, metadata={SEAL: _sealed(tensors)})
        write_bytes(folder / "scores" / f"{_hash(sorted(chosen))}-{detail.name.lower()}.safetensors", blob)


def _read_scores(path: Path) -> dict[str, AnswerScore]:
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        seal = (file.metadata() or {}).get(SEAL)
    if seal != _sealed(tensors):
        raise ValueError("its seal is not that of its content")
    counts, ends = tensors["num_labels"], np.cumsum(tensors["num_labels"])
    columns = [tensors[column] for column in COLUMNS if column in tensors]
    known = {}
    for i, name in enumerate(tensors["names"]):
        labels = slice(int(ends[i] - counts[i]), int(ends[i]))
        tokens = TokenScores(*(column[labels] for column in columns)) if columns else None
        numbers = float(tensors["avg_loss"][i]), float(tensors["prob"][i]), int(counts[i])
        known[name.tobytes().hex()] = AnswerScore(*numbers, tokens)
    return known
