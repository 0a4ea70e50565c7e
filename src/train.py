"""The central baseline: the same loop over all clients' rows, without a federation.

python src/train.py --config-name=train-lora.yaml experiment=finetune/tofu/default task_name=NAME ...
"""

import sys
from functools import partial
from pathlib import Path

from fedunlearn.doors.main import hydra_door
from fedunlearn.doors.shown import run_shown

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

if __name__ == "__main__":
    sys.exit(hydra_door(CONFIGS, "train-lora.yaml", partial(run_shown, "central")))
