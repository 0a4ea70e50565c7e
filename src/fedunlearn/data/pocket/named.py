"""The name by which a config asks for a pocket: `pocket:SEED`."""

import re
from pathlib import Path

from fedunlearn.data.pocket.build import PocketPaths, ensure_pocket

_NAME = re.compile(r"^pocket:(\d+)$")


def named_pocket(name: str, pocket_dir: Path) -> PocketPaths | None:
    """Gives the pocket that `pocket:SEED` names, built on first use, or None where the name is another one."""
    match = _NAME.match(name)
    return ensure_pocket(int(match.group(1)), pocket_dir) if match else None
