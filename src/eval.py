"""Evaluation of any base, adapter or run on TOFU.

python src/eval.py experiment=eval/tofu/default task_name=NAME ...
"""

import sys
from functools import partial
from pathlib import Path

from fedunlearn.doors.main import hydra_door
from fedunlearn.doors.shown import run_shown

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

if __name__ == "__main__":
    sys.exit(hydra_door(CONFIGS, "eval.yaml", partial(run_shown, "evaluation")))
