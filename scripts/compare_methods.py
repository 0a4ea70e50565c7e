"""Every unlearning method on the same request, beside fine-tuned model and retrain: one table.

python scripts/compare_methods.py experiment=unlearn/tofu/pocket [methods=[npo,rmu]] [seeds=[0,1,2]] [request=sample|client] [requests=[{authors: [18]}, {authors: [19]}]]
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the comparison; 0 when every row is there, 2 with a message where it cannot be."""
    from fedunlearn.doors.environment import set_environment

    set_environment()
    from fedunlearn.doors.compare import compare_and_tell
    from fedunlearn.doors.main import guarded
    from fedunlearn.reporting.console import set_logging

    set_logging()
    return guarded(lambda: compare_and_tell(sys.argv[1:], ROOT / "configs"))


if __name__ == "__main__":
    sys.exit(main())
