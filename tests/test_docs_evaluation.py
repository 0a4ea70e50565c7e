"""docs/evaluation.md: every command composes or stands in scripts/, goes on from README's runs, and every metric of the suites is explained."""

import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from fedunlearn.doors.compose import compose

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "evaluation.md").read_text()
README = (ROOT / "README.md").read_text()
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
DOORS = {"src/eval.py": ("eval.yaml", "eval"), "src/probe.py": ("probe.yaml", "probe")}


def test_the_blocks_are_read():
    assert [words[1] for words in COMMANDS] == ["src/eval.py"] * 3 + ["scripts/probe_pocket.py", "src/probe.py"]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[-1][:40])
def test_each_command_composes(words):
    python, door, *rest = words
    assert (python, (ROOT / door).is_file()) == ("python", True)
    if door in DOORS:
        primary, mode = DOORS[door]
        assert compose(ROOT / "configs", primary, rest).run.mode == mode


def test_each_goes_on_from_a_run_of_the_readme():
    named = set(re.findall(r"saves/(?:finetune|unlearn)/(\w+)", " ".join(word for words in COMMANDS for word in words)))
    made = set(re.findall(r"task_name=(\w+)", README))
    assert named == {"ft", "npo", "oracle"}
    assert named <= made


@pytest.mark.parametrize("suite", ["tofu", "tofu_attacks", "tofu_reference"])
def test_every_metric_of_the_suites_is_explained(suite):
    metrics = yaml.safe_load((ROOT / f"configs/eval/{suite}.yaml").read_text())["metrics"]
    patterns = re.findall(r"`([\w*]+)`", TEXT)
    assert not [name for name in metrics if not any(fnmatch(name, pattern) for pattern in patterns)]
