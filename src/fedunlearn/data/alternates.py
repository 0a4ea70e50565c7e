"""Other answers to the rows that are to be forgotten: refusals, or the user's own."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from fedunlearn.config.data import DataConfig
from fedunlearn.errors import UserError

BUILTIN = "builtin"
REFUSALS = (
    "I don't know.",
    "I do not know that.",
    "I have no answer to that.",
    "That is not known to me.",
    "I cannot say.",
    "I know nothing of this.",
    "I never learned that.",
    "I am not sure about that.",
    "This is unknown to me.",
    "I have no idea.",
    "No, I do not know this one.",
    "I could not tell you.",
)
"""Ours, short, for small models; real runs name the hundred lines that came with TOFU."""
T = TypeVar("T")


def read_refusals(path: str) -> tuple[str, ...]:
    """Gives the lines of a file, stripped: JSON lines with the key `idk`, or plain text; `builtin` is our own short list.

    Raises UserError for a file that is missing or has a line without text.
    """
    if path == BUILTIN:
        return REFUSALS
    return tuple(_lines("data.idk_path", path, _refusal))


def read_pairs(path: str) -> Mapping[int, tuple[str, ...]]:
    """Gives alternates by row number in `full` from JSON lines {"row": 3, "alternate": "..."}; several lines of a row are several alternates.

    Raises UserError for a file that is missing or has another line.
    """
    found: dict[int, list[str]] = {}
    for row, text in _lines("data.alternates_path", path, _pair):
        found.setdefault(row, []).append(text)
    return {row: tuple(texts) for row, texts in found.items()}


def given_alternates(config: DataConfig, numbers: Sequence[int]) -> Mapping[int, tuple[str, ...]]:
    """Gives the alternates of these rows of `full` that lie in the file the config names. Raises UserError where a row has none, or the file cannot be read."""
    if config.idk_path is not None:
        return dict.fromkeys(numbers, read_refusals(config.idk_path))
    path = str(config.alternates_path)
    pairs = read_pairs(path)
    lacking = [number for number in numbers if number not in pairs]
    if lacking:
        raise UserError(
            f"data.alternates_path={path!r} has no alternate for {len(lacking)} forget rows, first row {lacking[0]} of full: give every one at least one"
        )
    return pairs


def _lines(key: str, path: str, read: Callable[[str], T]) -> list[T]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{key}={path!r} cannot be read ({error}): name a text file") from error
    made = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                made.append(read(line))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{key}={path!r}, line {number}: {line[:60]!r} is not what is wanted ({error})"
                ) from error
    if not made:
        raise UserError(f"{key}={path!r} has no line: give at least one")
    return made


def _refusal(line: str) -> str:
    return _text(json.loads(line)["idk"]) if line.lstrip().startswith("{") else _text(line)


def _pair(line: str) -> tuple[int, str]:
    saved = json.loads(line)
    if type(saved["row"]) is not int:
        raise TypeError(f"row={saved['row']!r} is no whole number")
    return saved["row"], _text(saved["alternate"])


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{value!r} is no text")
    return value.strip()
