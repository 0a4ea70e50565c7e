"""The central baseline: the same loop over all rows, without a federation.

python src/train.py --config-name=train-lora.yaml experiment=finetune/tofu/default task_name=NAME ...
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedunlearn.doors.main import hydra_door

if TYPE_CHECKING:
    from fedunlearn.doors.compose import ComposedConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def _run(composed: "ComposedConfig") -> None:
    from fedunlearn.doors.stages import run_central
    from fedunlearn.reporting.console import set_logging, show_config, show_result
    from fedunlearn.reporting.run_folder import run_path

    set_logging()
    show_config(composed.plain)
    show_result(run_path(composed.run), run_central(composed))


def main() -> int:
    """Composes, runs and gives the exit code."""
    return hydra_door(CONFIGS, "train-lora.yaml", _run)


if __name__ == "__main__":
    sys.exit(main())
