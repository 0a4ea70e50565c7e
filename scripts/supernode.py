"""One client of a federation.

python scripts/supernode.py client0.yaml
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Runs the node until Ctrl-C or SIGTERM; 0 when it ended well, 2 with a message where it did not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="the client's YAML")
    parser.add_argument("--print", action="store_true", dest="only_print", help="only tell Flower's command")
    args = parser.parse_args()
    from fedunlearn.doors.main import guarded
    from fedunlearn.sites.node import run_node

    return guarded(lambda: run_node(args.site, only_print=args.only_print))


if __name__ == "__main__":
    sys.exit(main())
