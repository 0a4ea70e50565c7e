"""Adapters as files: parameters, merging, comparing, adding, verifying.

python scripts/adapter.py summary config.json --r 8 --targets c_attn
python scripts/adapter.py merge saves/unlearn/npo --to merged --dtype bf16 --keep
python scripts/adapter.py add saves/finetune/ft saves/unlearn/npo --weights 1 -0.5 --to sum
"""

import sys


def main() -> int:
    """Does it; 0 when it is done, 2 with a message where it cannot be, or a check does not hold."""
    from fedunlearn.doors.environment import set_environment

    set_environment()
    from fedunlearn.doors.adapter import read, serve
    from fedunlearn.doors.main import guarded

    args = read()
    return guarded(lambda: serve(args))


if __name__ == "__main__":
    sys.exit(main())
