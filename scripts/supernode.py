"""One client of a federation.

python scripts/supernode.py client0.yaml
python scripts/supernode.py client0.yaml --end-workers
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Runs the node until Ctrl-C or SIGTERM; 0 when it ended well, 2 with a message where it did not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="the client's YAML")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--print", action="store_true", dest="only_print", help="only tell Flower's command")
    instead.add_argument(
        "--end-workers",
        action="store_true",
        help="ask the workers of the running node to end, which frees the memory they hold",
    )
    args = parser.parse_args()
    from fedunlearn.doors.main import guarded

    if args.end_workers:
        from fedunlearn.federation.deployed.ending import told_end

        return guarded(lambda: sys.stdout.write(f"{told_end(args.site)}\n"))
    from fedunlearn.sites.node import run_node

    return guarded(lambda: run_node(args.site, only_print=args.only_print))


if __name__ == "__main__":
    sys.exit(main())
