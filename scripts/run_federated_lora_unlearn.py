"""Federated LoRA unlearning with the usual defaults; takes the same arguments as src/fed_train.py, which win.

python scripts/run_federated_lora_unlearn.py task_name=npo model.model_args.pretrained_model_name_or_path=saves/finetune/ft

saves/finetune/ft: a fine-tuning run with the same model; task_name: the folder of the result, saves/unlearn/npo.
"""

import sys
from functools import partial
from pathlib import Path

from fedunlearn.doors.main import hydra_door
from fedunlearn.doors.shown import run_shown

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULTS = ("experiment=unlearn/tofu/default", "model=Llama-3.2-3B-Instruct-lora")

if __name__ == "__main__":
    sys.exit(hydra_door(CONFIGS, "unlearn-lora.yaml", partial(run_shown, "federated"), [*DEFAULTS, *sys.argv[1:]]))
