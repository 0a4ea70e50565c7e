"""Does an unlearning hold? Models attacked alike, beside the oracle.

python src/probe.py experiment=probe/tofu/default task_name=NAME 'probe.unlearned={npo: saves/unlearn/NAME}' probe.oracle=saves/finetune/ORACLE
"""

import sys
from functools import partial
from pathlib import Path

from fedunlearn.doors.main import hydra_door
from fedunlearn.doors.shown import run_shown

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

if __name__ == "__main__":
    sys.exit(hydra_door(CONFIGS, "probe.yaml", partial(run_shown, "probe")))
