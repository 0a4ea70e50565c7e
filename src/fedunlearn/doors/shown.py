"""One run as a person sees it: logging set up, the config in short, the work, the result."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from fedunlearn.doors.compose import ComposedConfig

Stage = Literal["federated", "central", "evaluation", "probe"]


def run_shown(stage: Stage, composed: "ComposedConfig") -> None:
    """Does what a door is for. Imports torch inside, after the door has set the environment."""
    from fedunlearn.config.run import TrainRun
    from fedunlearn.doors.evaluation import run_evaluations
    from fedunlearn.doors.probe import tell_probe
    from fedunlearn.doors.sequence import run_served
    from fedunlearn.doors.stages import run_central
    from fedunlearn.doors.submission import run_submission
    from fedunlearn.evals.lm_eval_file import read_lm_eval
    from fedunlearn.reporting.console import (
        set_logging,
        show_config,
        show_evaluations,
        show_lm_eval,
        show_result,
        show_submitted,
    )
    from fedunlearn.reporting.run_folder import run_path

    set_logging()
    show_config(composed.plain)
    if stage == "federated":
        if isinstance(composed.run, TrainRun) and composed.run.launcher.submits:
            show_submitted(run_submission(composed))
        else:
            show_result(*run_served(composed))
    elif stage == "central":
        show_result(run_path(composed.run), run_central(composed))
    elif stage == "probe":
        tell_probe(composed)
    else:
        logs = run_evaluations(composed)
        show_evaluations(logs)
        general = {folder.name: found for folder in logs if (found := read_lm_eval(folder)) is not None}
        if general:
            show_lm_eval(general)
