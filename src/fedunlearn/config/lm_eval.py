"""The record of the group `lm_eval`."""

from dataclasses import dataclass

from fedunlearn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LmEvalConfig:
    """What lm-evaluation-harness asks the model, beside TOFU.

    tasks: names of tasks, groups or tags, the harness's own or those of include_path (a folder with YAMLs). limit: rows of each task (null: all; else the result is
    marked as a trial). num_fewshot: examples before each question (null: what the task says). batch_size: requests scored or generated at once.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    include_path: str | None = None

    def __post_init__(self) -> None:
        faults = [fault for holds, fault in self._rules() if not holds]
        if faults:
            raise UserError(*faults)

    def _rules(self) -> list[tuple[bool, str]]:
        return [
            (
                bool(self.tasks),
                "lm_eval.tasks=[] names none: give some ('lm_eval.tasks=[hellaswag]'), or leave lm_eval out",
            ),
            (
                len(set(self.tasks)) == len(self.tasks),
                f"lm_eval.tasks={list(self.tasks)} names one twice: give each once",
            ),
            (
                self.limit is None or self.limit >= 1,
                f"lm_eval.limit={self.limit} must be at least 1, or null (all rows)",
            ),
            (
                self.num_fewshot is None or self.num_fewshot >= 0,
                f"lm_eval.num_fewshot={self.num_fewshot} must be at least 0, or null (what each task says)",
            ),
            (self.batch_size >= 1, f"lm_eval.batch_size={self.batch_size} must be at least 1"),
        ]
