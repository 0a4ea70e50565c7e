"""One client's own rows of TOFU, as a folder for a machine that must not hold anybody else's.

python scripts/own_rows.py --tofu saves/pocket/seed0/data --partition saves/finetune/ft --client 1 --to client1/data
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Writes the folder; 0 when it is written, 2 with a message where it cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tofu", required=True, help="folder of all of TOFU, or its hub id")
    parser.add_argument("--partition", type=Path, required=True, help="a run's folder or its partition.json")
    parser.add_argument("--client", type=int, required=True, help="number of the client in the partition")
    parser.add_argument("--to", type=Path, required=True, help="folder to be made")
    args = parser.parse_args()
    from fedunlearn.doors.main import guarded
    from fedunlearn.doors.own_rows import split_off

    return guarded(lambda: sys.stdout.write(f"{split_off(args.tofu, args.partition, args.client, args.to)}\n"))


if __name__ == "__main__":
    sys.exit(main())
