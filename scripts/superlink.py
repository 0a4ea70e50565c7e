"""The server of a federation.

python scripts/superlink.py start server.yaml
python scripts/superlink.py fetch server.yaml my_task --to results
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
    fetch = commands.add_parser("fetch", help="copy a run's history, records and adapter")
    fetch.add_argument("site", help="the server's YAML; with --ssh its path on that machine")
    fetch.add_argument("task", help="the run's task_name")
    fetch.add_argument("--to", type=Path, required=True, help="folder in which a folder of the run's name is made")
    fetch.add_argument("--ssh", metavar="USER@HOST", help="the server's machine; without, it is this one")
    args = parser.parse_args()
    from fedunlearn.doors.main import guarded
    from fedunlearn.sites.fetch import fetch_run
    from fedunlearn.sites.server import run_server

    if args.command == "fetch":
        return guarded(lambda: sys.stdout.write(f"{fetch_run(args.site, args.task, args.to, args.ssh)}\n"))
    return guarded(lambda: run_server(args.site, only_print=args.only_print))


if __name__ == "__main__":
    sys.exit(main())
