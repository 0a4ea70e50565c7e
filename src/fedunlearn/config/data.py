"""Records of the groups `data`, `collator`, `partition` and `paths`."""

from dataclasses import dataclass
from typing import Literal

from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST, SMALLEST
from fedunlearn.partitions.base import Partitioner


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows a run trains on.

    rows: `full` (fine-tuning), `retain` (the oracle), `forget_and_retain` (unlearning).
    max_length: tokens of a row; a row that does not fit is an error, never cut. retain_per_forget: retain rows that meet
    each forget row in a step, drawn with replacement from the client's own.
    allow_empty_clients: let clients without a row to train on stand idle; else they are refused.
    idk_path: refusals, one a line (JSON lines with the key `idk`, or text), for methods that want some; `builtin` is a short list of ours.
    alternates_path: the user's other answers, JSON lines with `row` (of full) and `alternate`, for methods that want pairs.
    """

    rows: Literal["full", "retain", "forget_and_retain"]
    max_length: int = 512
    retain_per_forget: int = 1
    allow_empty_clients: bool = False
    idk_path: str | None = None
    alternates_path: str | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UserError(f"data.max_length={self.max_length} must be at least 2 tokens")
        if self.retain_per_forget < 1:
            raise UserError(
                f"data.retain_per_forget={self.retain_per_forget} must be at least 1 (method.retain=none switches the retain term off)"
            )


@dataclass(frozen=True, kw_only=True)
class CollatorConfig:
    """How rows become a batch: padding_side `right` or `left`, lengths rounded up to a multiple of pad_to_multiple_of (null: 1)."""

    padding_side: Literal["right", "left"] = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise UserError(f"collator.pad_to_multiple_of={self.pad_to_multiple_of} must be at least 1 or null")


@dataclass(frozen=True, kw_only=True)
class PartitionConfig:
    """Who owns which rows: read from `path`, else from the run that the adapter comes from, else made by `scheme`.

    path: a partition.json or a run's folder. scheme: what a partition that is read must have been made by; null = any, and
    by_author where one has to be made.
    ranks, lora_alphas: LoRA rank r_k and alpha_k of each client, in client order, where they differ from the model's; the adapter of the model has
    the largest rank there can be. Null: all have the model's.
    joins: client -> the round from which it is there; null: all from the first.
    allow_gaps: whether `path` may leave rows to nobody: no client trains on them, and none can unlearn them.
    """

    scheme: Partitioner | None = None
    path: str | None = None
    ranks: tuple[int, ...] | None = None
    lora_alphas: tuple[float, ...] | None = None
    joins: dict[int, int] | None = None
    allow_gaps: bool = False

    def __post_init__(self) -> None:
        if self.ranks is not None and min(self.ranks, default=0) < 1:
            raise UserError(f"partition.ranks={list(self.ranks)} must be whole numbers from 1, one a client")
        alphas = self.lora_alphas
        if alphas is not None and not (alphas and SMALLEST <= min(alphas) <= max(alphas) <= LARGEST):
            raise UserError(f"partition.lora_alphas={list(alphas)} must be numbers from 1e-6 to 1e6, one a client")
        if self.joins is not None and min(self.joins.values(), default=1) < 1:
            raise UserError(f"partition.joins={self.joins}: rounds count from 1")

    def joins_at(self, client: int) -> int:
        """The round from which a client is there."""
        return (self.joins or {}).get(client, 1)


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """saves_dir: runs. pocket_dir: built pockets. cache_dir: what clients keep between messages (reference adapters and their sums)."""

    saves_dir: str = "saves"
    pocket_dir: str = "saves/pocket"
    cache_dir: str = "saves/cache"


FOLDER_OF_MODE = {"train": "finetune", "unlearn": "unlearn", "eval": "eval", "probe": "probe"}
"""Where under saves_dir the runs of a mode lie, each in a folder of its task_name."""


LONGEST_TASK_NAME = 200
"""Bytes: file systems take 255, and folders that are being made have longer names."""


def task_name_rule(name: str) -> tuple[bool, str]:
    """Whether a name can be a run's folder, and the fault where it cannot."""
    plain = (
        bool(name.strip())
        and name == name.strip()
        and name not in (".", "..")
        and not any(mark in name for mark in "/\\\0")
        and len(name.encode(errors="replace")) <= LONGEST_TASK_NAME
    )
    return plain, (
        f"task_name={name[:LONGEST_TASK_NAME]!r} must be a plain folder name: no separators, no blanks around it, at most "
        f"{LONGEST_TASK_NAME} bytes"
    )
