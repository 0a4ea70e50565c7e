"""Every unlearning method on the same request, beside fine-tuned model and retrain: one table.

python scripts/compare_methods.py experiment=unlearn/tofu/pocket 'seeds=[0,1,2]'

Goes on where it was stopped: what is done is not run again. Keys, all of them optional:
  experiment=   unlearn/tofu/<name of a file in configs/compare>; unlearn/tofu/pocket
  methods=      a list of that recipe's methods, as in 'methods=[npo,rmu]'; all of them
  seeds=        a list of whole numbers from 0; [0]
  request=      one of the recipe's: sample (its forget split) or client (all of a client); sample
  requests=     a list of your own, one after the other, as in 'requests=[{authors: [18]}, {authors: [19]}]'
  task_name=    the folder below <saves_dir>/compare/ that the table goes to, and what its runs' names begin with; compare
  saves_dir=    where runs and table lie; saves
  pocket_dir=   where the pocket lies, built where it is not yet; saves/pocket
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs the comparison; 0 when every row is there, 2 with a message where it cannot be."""
    if {"--help", "-h"}.intersection(sys.argv[1:]):
        sys.stdout.write(__doc__)
        return 0
    from fedunlearn.doors.environment import set_environment

    set_environment()
    from fedunlearn.doors.compare import compare_and_tell
    from fedunlearn.doors.main import guarded
    from fedunlearn.reporting.console import set_logging

    set_logging()
    return guarded(lambda: compare_and_tell(sys.argv[1:], ROOT / "configs"))


if __name__ == "__main__":
    sys.exit(main())
