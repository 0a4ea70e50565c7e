"""Evaluation of any base, adapter or run on TOFU.

python src/eval.py experiment=eval/tofu/default task_name=NAME ...
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedunlearn.doors.main import hydra_door

if TYPE_CHECKING:
    from fedunlearn.doors.compose import ComposedConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def _run(composed: "ComposedConfig") -> None:
    from fedunlearn.doors.stages import run_evaluation
    from fedunlearn.reporting.console import set_logging, show_config, show_result
    from fedunlearn.reporting.run_folder import run_path

    set_logging()
    show_config(composed.plain)
    show_result(run_path(composed.run), run_evaluation(composed))


def main() -> int:
    """Composes, runs and gives the exit code."""
    return hydra_door(CONFIGS, "eval.yaml", _run)


if __name__ == "__main__":
    sys.exit(main())
