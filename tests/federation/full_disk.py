"""A run on a file system that is really full, for test_resume.py: started in a mount namespace of its own, where <place> is a small tmpfs.

python full_disk.py <data> <model> <place> <KiB free> ...: for each number a run of two rounds has so much room left after its first; prints a JSON list of what it said.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from helpers_runs import adapter_bytes, finetune, history

from fedunlearn.data.pocket.build import PocketPaths
from fedunlearn.errors import UserError
from fedunlearn.federation import rounds
from fedunlearn.federation.checkpoint import latest_checkpoint

SETTINGS = ("strategy=fedadam", "strategy.server_lr=0.1", "ledger.enabled=true")


def fill(place: Path, free: int) -> None:
    """Writes one file that leaves `free` bytes."""
    room = os.statvfs(place)
    (place / "filler").write_bytes(bytes(max(room.f_bavail * room.f_frsize - free, 0)))


def attempt(pocket: PocketPaths, place: Path, free: int, whole: bytes) -> dict[str, object]:
    """Runs until the disk is full in the second round, then makes room and goes on."""
    saves, real = place / "saves", rounds.save_checkpoint
    shutil.rmtree(saves, ignore_errors=True)

    def save_and_fill(folder, *rest):
        real(folder, *rest)
        if not (place / "filler").exists():
            fill(place, free)

    rounds.save_checkpoint = save_and_fill
    try:
        finetune(pocket, saves, "x", *SETTINGS)
        said = ""
    except UserError as error:
        said = str(error)
    finally:
        rounds.save_checkpoint = real
        (place / "filler").unlink()
    run = saves / "finetune" / "x"
    left = [path.name for path in run.rglob(".*")]
    found = {"free": free, "said": said, "round": latest_checkpoint(run).state.round, "left": left}
    resumed = finetune(pocket, saves, "x", *SETTINGS, "resume=true")
    return {**found, "same": adapter_bytes(resumed) == whole, "rounds": [line["round"] for line in history(resumed)]}


def main() -> None:
    """Runs undisturbed once, then for each number."""
    data, model, place, *numbers = sys.argv[1:]
    pocket = PocketPaths(data=Path(data), model=Path(model))
    whole = adapter_bytes(finetune(pocket, Path(place) / "saves", "x", *SETTINGS))
    sys.stdout.write(json.dumps([attempt(pocket, Path(place), int(k) * 1024, whole) for k in numbers]) + "\n")


if __name__ == "__main__":
    main()
