"""The server of a federation.

python scripts/superlink.py start server.yaml
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Runs the subcommand; 0 when it ended well, 2 with a message where it did not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("start", help="run the SuperLink until Ctrl-C or SIGTERM")
    start.add_argument("site", type=Path, help="the server's YAML")
    start.add_argument("--print", action="store_true", dest="only_print", help="only tell Flower's commands")
    args = parser.parse_args()
    from fedunlearn.doors.main import guarded
    from fedunlearn.sites.server import run_server

    return guarded(lambda: run_server(args.site, only_print=args.only_print))


if __name__ == "__main__":
    sys.exit(main())
