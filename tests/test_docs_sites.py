"""docs/sites.md: its commands are taken, and its tables have the keys that a YAML may have."""

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedunlearn.config.sites import ClientSite, Policy, ServerSite

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "sites.md").read_text()
BLOCK = re.search(r"^```\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[1]
COMMANDS = [shlex.split(line) for line in BLOCK.splitlines()]


def test_each_command_is_taken_after_the_one_before(tmp_path):
    for name in ("data", "model"):
        (tmp_path / "saves" / "pocket" / "seed0" / name).mkdir(parents=True)
    for python, script, *words in COMMANDS:
        assert python == "python"
        only_print = ["--print"] if "make_certificates" not in script else []
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *words, *only_print],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert not only_print or "flower-super" in done.stderr


@pytest.mark.parametrize(
    ("title", "kind"),
    [("The server's YAML", ServerSite), ("A client's YAML", ClientSite), ("The policy's YAML", Policy)],
)
def test_each_key_is_explained(title, kind):
    section = TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]
    keys = [key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(kind))
