"""What a run's history says: a table, or a Prometheus textfile for node_exporter's textfile collector.

python scripts/history.py saves/unlearn/NAME [--prometheus /var/lib/node_exporter/NAME.prom]
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Tells it; 0 when that is done, 2 with a message where it cannot be."""
    parser = argparse.ArgumentParser(description="Show a run's rounds, or write them down for Prometheus.")
    parser.add_argument("folder", type=Path, help="the run's folder")
    parser.add_argument("--prometheus", type=Path, metavar="FILE", help="write this textfile in place of the table")
    args = parser.parse_args()
    from fedunlearn.doors.environment import set_environment

    set_environment()
    from fedunlearn.doors.history import tell_history
    from fedunlearn.doors.main import guarded

    return guarded(lambda: tell_history(args.folder, args.prometheus))


if __name__ == "__main__":
    sys.exit(main())
