"""What runs inside a SuperLink: `app` is named by the bundle that launcher=superlink submits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedunlearn.doors.environment import set_environment

set_environment()

from fedunlearn.doors.compose import as_composed  # noqa: E402
from fedunlearn.doors.sequence import run_served  # noqa: E402
from fedunlearn.federation.deployed.server import Carry, make_submitted_app  # noqa: E402
from fedunlearn.files import read_object  # noqa: E402
from fedunlearn.reporting.console import figures, set_logging  # noqa: E402
from fedunlearn.reporting.run_folder import DONE  # noqa: E402


def run_submitted(plain: Mapping[str, Any], carry: Carry) -> Mapping[str, Any]:
    """Does the door's work for a submitted config; gives the last run's folder, what it cost, and its metrics where it was evaluated."""
    set_logging()
    folder, log = run_served(as_composed(plain), carry)
    return {
        "folder": str(Path(*folder.parts[-2:])),
        "metrics": {} if log is None else figures(log),
        "done": read_object(folder / DONE),
    }


app = make_submitted_app(run_submitted)
