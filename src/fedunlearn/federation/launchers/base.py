"""The interface of a launcher: carry a prepared run to its last round."""

from collections.abc import Mapping
from functools import singledispatch

from fedunlearn.config.launcher import Launcher


@singledispatch
def launch(launcher: Launcher, plain: Mapping[str, object]) -> None:
    """Runs the rounds of a run whose folder is prepared (config, partition.json, start/); its checkpoints are the result.

    One registration a record of fedunlearn.config.launcher. plain: the composed config, JSON values. Raises UserError where the
    run cannot be completed.
    """
    raise TypeError(f"no launcher is registered for {type(launcher).__name__}")
