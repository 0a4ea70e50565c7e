"""Handing a run to a server elsewhere: what can be known here is checked here."""

from collections.abc import Mapping
from typing import Any

from fedunlearn.config.launcher import SuperlinkLauncher
from fedunlearn.config.run import TrainRun
from fedunlearn.doors.compose import ComposedConfig
from fedunlearn.errors import UserError
from fedunlearn.federation.launchers.superlink import submit
from fedunlearn.sites.checks import Way, check_way


def run_submission(composed: ComposedConfig) -> Mapping[str, Any]:
    """Submits a federated run and follows it to its end; gives what the server tells of the result."""
    run = composed.run
    if not isinstance(run, TrainRun) or not isinstance(run.launcher, SuperlinkLauncher):
        raise UserError(
            f"mode={run.mode!r} is for src/eval.py: give --config-name=train-lora.yaml or unlearn-lora.yaml"
        )
    launcher = run.launcher
    check_way(
        Way(
            key="launcher.address",
            address=launcher.superlink,
            ca_key="launcher.root_certificates",
            ca=launcher.root_certificates,
            insecure=launcher.insecure,
        )
    )
    return submit(launcher, composed.plain)
