"""What lm-evaluation-harness found: figures of tasks, and what they were made with."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One metric of one task, in the harness's own unit. None: it is no finite number, or has no standard error."""

    value: float | None
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class TaskFigures:
    """One task or group.

    metrics: by the harness's name, with its filter where there is one (`exact_match,strict-match`). num_rows: rows asked; of a group those of its parts.
    num_fewshot, version: None where a group's parts differ or say none. rows_hash: sha256 of what was asked, None for a group. part_of: the group it was asked for.
    """

    metrics: Mapping[str, Figure]
    num_rows: int
    num_fewshot: int | None
    version: str | float | None
    rows_hash: str | None
    part_of: str | None


@dataclass(frozen=True)
class LmEvalLog:
    """LM_EVAL.json. provenance: base, adapter, config, versions, settings."""

    tasks: Mapping[str, TaskFigures]
    provenance: Mapping[str, object]

    @property
    def main_figures(self) -> tuple[tuple[str, str], ...]:
        """(task, metric) of what stands by itself: tasks and groups that are part of no other."""
        return tuple(
            (name, metric) for name, task in self.tasks.items() if task.part_of is None for metric in task.metrics
        )
