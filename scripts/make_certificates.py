"""Certificates, keys and YAMLs of a trial federation, one folder a machine.

python scripts/make_certificates.py --to trial --clients 3 --host localhost --tofu saves/pocket/seed0/data --model pocket:0=saves/pocket/seed0/model
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Writes them; 0 when it is done, 2 with a message where it cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--to", type=Path, required=True, help="folder in which authority/, server/ and client0/ ... are made"
    )
    parser.add_argument(
        "--host", action="append", default=[], help="name or IP address of the server; several times for several"
    )
    parser.add_argument("--clients", type=int, default=3, help="how many clients")
    parser.add_argument("--days", type=int, default=90, help="until the certificates expire")
    parser.add_argument("--model", action="append", default=[], metavar="ID=FOLDER", required=True, help="a base model")
    benchmark = parser.add_mutually_exclusive_group(required=True)
    benchmark.add_argument("--tofu", help="folder of TOFU's data")
    benchmark.add_argument("--muse", help="folder of MUSE's data")
    parser.add_argument("--port", type=int, default=8000, help="the SuperLink's port")
    parser.add_argument(
        "--open-control", action="store_true", help="no proxy: for a network in which everybody is trusted"
    )
    parser.add_argument("--overwrite", action="store_true", help="make everything anew")
    args = parser.parse_args()
    wrong = [model for model in args.model if not all(model.partition("="))]
    if wrong:
        parser.error(f"--model {wrong[0]}: give ID=FOLDER")
    from fedunlearn.doors.main import guarded
    from fedunlearn.sites.certificates import Federation, make_federation

    def make() -> None:
        wanted = Federation(
            hosts=args.host or ["localhost", "127.0.0.1"],
            clients=args.clients,
            days=args.days,
            models=dict(model.split("=", 1) for model in args.model),
            benchmark="tofu" if args.tofu else "muse",
            data=args.tofu or args.muse,
            port=args.port,
            open_control=args.open_control,
        )
        for path in make_federation(args.to, wanted, overwrite=args.overwrite):
            sys.stdout.write(f"{path}\n")

    return guarded(make)


if __name__ == "__main__":
    sys.exit(main())
