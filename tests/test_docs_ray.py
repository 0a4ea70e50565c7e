"""docs/ray.md: its tables have the launcher's keys, and its commands compose."""

import dataclasses
import re
import shlex
from pathlib import Path

from helpers_runs import CONFIGS

from fedunlearn.config.launcher import RayLauncher
from fedunlearn.doors.compose import compose

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "ray.md").read_text()


def test_the_table_has_the_launchers_keys_and_defaults():
    rows = re.findall(r"^\| (`launcher\..*?`)(?: \((.*?)\))? \|", TEXT, re.MULTILINE)
    told = {}
    for names, defaults in rows:
        told |= dict(zip(re.findall(r"launcher\.(\w+)", names), defaults.split(", "), strict=True))
    default = RayLauncher()
    expected = {field.name: getattr(default, field.name) for field in dataclasses.fields(RayLauncher)}
    assert told == {name: "null" if value is None else f"{value:g}" for name, value in expected.items()}


def test_its_runs_compose():
    commands = [shlex.split(line) for line in TEXT.splitlines() if "src/fed_train.py --config-name" in line and line.startswith("python")]  # fmt: skip
    found = [compose(CONFIGS, "train-lora.yaml", words[3:]).run.launcher for words in commands]
    assert found == [
        RayLauncher(threads=1, client_cpus=1),
        RayLauncher(threads=1, address="10.0.0.1:6379", min_nodes=2),
    ]  # the pocket's threads
