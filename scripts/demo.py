"""The whole story on the pocket model, in one process: see README.

python scripts/demo.py --seed 1
"""

import argparse
import sys
import time
from pathlib import Path

BEGAN = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the demo; 0 when it is done, 2 with a message where it cannot be."""
    parser = argparse.ArgumentParser(description="Fine-tune, retrain, unlearn and evaluate on the pocket model.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the invented world and of the training")
    parser.add_argument("--saves", type=Path, default=Path("saves/demo"), help="folder of the results")
    parser.add_argument("--pocket", type=Path, default=Path("saves/pocket"), help="folder of the built pocket models")
    args = parser.parse_args()
    from fedunlearn.doors.environment import set_environment

    set_environment()
    from fedunlearn.doors.demo import run_demo
    from fedunlearn.doors.main import guarded
    from fedunlearn.reporting.console import set_logging

    set_logging()
    spent = time.monotonic() - BEGAN
    return guarded(lambda: run_demo(args.seed, ROOT / "configs", args.saves, args.pocket, spent))


if __name__ == "__main__":
    sys.exit(main())
