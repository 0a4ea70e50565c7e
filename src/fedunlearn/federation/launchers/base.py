"""The interface of a launcher: carry a prepared run to its last round."""

from collections.abc import Mapping
from functools import singledispatch

from fedunlearn.config.launcher import Launcher
from fedunlearn.errors import UserError


@singledispatch
def launch(launcher: Launcher, plain: Mapping[str, object]) -> None:
    """Runs the rounds of a run whose folder is prepared (config, partition.json, start/); its checkpoints are the result.

    One registration a record of fedunlearn.config.launcher. plain: the composed config, JSON values. Raises UserError where the
    run cannot be completed.
    """
    raise _unknown(launcher)


def check_launcher(launcher: Launcher) -> None:
    """Raises UserError for a record that no launcher is registered for, and for one that could not begin."""
    if not launcher.submits and launch.dispatch(type(launcher)) is launch.dispatch(object):
        raise _unknown(launcher)
    check_way(launcher)


@singledispatch
def check_way(launcher: Launcher) -> None:
    """Raises UserError for what can be known of the way to the clients before a model is loaded; most launchers have nothing to look at."""


def _unknown(launcher: Launcher) -> UserError:
    kind = type(launcher)
    return UserError(
        f"launcher._target_={f'{kind.__module__}.{kind.__qualname__}'!r} is a record without a launcher: choose launcher=local, launcher=ray or launcher=superlink, "
        "or register yours with fedunlearn.federation.launchers.launch.register in the module that defines it"
    )
