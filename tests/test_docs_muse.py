"""docs/muse.md: every command composes, each goes on from a run that stands before it, and every metric of the suite is explained."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from fedunlearn.doors.compose import compose

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "muse.md").read_text()
BLOCK = re.search(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[1].replace("\\\n", " ")
COMMANDS = [shlex.split(line) for line in BLOCK.splitlines()]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[1])
def test_each_command_composes(words):
    python, door, *rest = words
    assert (python, (ROOT / door).is_file()) == ("python", True)
    named = [word.partition("=")[2] for word in rest if word.startswith("--config-name=")]
    run = compose(
        ROOT / "configs", (named or ["eval.yaml"])[0], [word for word in rest if not word.startswith("--")]
    ).run
    assert (run.muse_path, run.eval.name) == ("muse-bench/MUSE-News", "muse")


def test_each_goes_on_from_a_run_that_stands_before_it():
    made = set()
    for words in COMMANDS:
        assert set(re.findall(r"saves/finetune/(\w+)", " ".join(words))) <= made
        made |= {word.partition("=")[2] for word in words if word.startswith("task_name=")}


def test_the_attack_that_is_given_as_an_example_composes():
    (example,) = re.findall(r"`(\+eval\.metrics\.mia_loss.*?)`", TEXT)
    run = compose(ROOT / "configs", "eval.yaml", ["experiment=eval/muse/default", "task_name=t", *example.split()]).run
    assert (run.eval.metrics["mia_loss"].forget, run.eval.metrics["mia_loss"].holdout) == (
        "forget_privleak",
        "holdout_privleak",
    )


def test_every_metric_of_the_suite_is_explained():
    metrics = yaml.safe_load((ROOT / "configs/eval/muse.yaml").read_text())["metrics"]
    assert not [name for name in metrics if f"`{name}`" not in TEXT]
