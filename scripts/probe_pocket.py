"""Does an unlearning hold? On the pocket, from nothing to the table: NPO, GradDiff, the oracle, the base, and a fake that only looks unlearned.

python scripts/probe_pocket.py --seed 1
"""

import argparse
import sys
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main() -> int:
    """Tells the story; 0 when it is done, 2 with a message where it cannot be."""
    parser = argparse.ArgumentParser(description="Unlearn on the pocket in three ways, and attack what came of it.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the invented world and of the training")
    parser.add_argument("--saves", type=Path, default=Path("saves/probes"), help="folder of the results")
    parser.add_argument("--pocket", type=Path, default=Path("saves/pocket"), help="folder of the built pocket models")
    args = parser.parse_args()
    from fedunlearn.doors.environment import set_environment

    set_environment()
    from fedunlearn.doors.main import guarded
    from fedunlearn.doors.probe_story import run_probe_story
    from fedunlearn.reporting.console import set_logging

    set_logging()
    return guarded(lambda: run_probe_story(args.seed, CONFIGS, args.saves, args.pocket))


if __name__ == "__main__":
    sys.exit(main())
