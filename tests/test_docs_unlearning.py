"""docs/unlearning.md: every line of its blocks composes, and in the order they stand they run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedunlearn.doors.compose import compose

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(python)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    """(language, text) of each block; without a name it is the shell's."""
    return [(found[1] or "bash", found[2]) for found in BLOCK.finditer((ROOT / "docs" / "unlearning.md").read_text())]


def commands():
    """Every command of the shell's blocks as words, with $U and $S put in."""
    known, found = {}, []
    for language, text in blocks():
        for line in text.splitlines() if language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[0][1:2] == "=":
                known["$" + words[0][0]] = shlex.split(words[0][2:])
            else:
                found.append([*known.get(words[0], words[:1]), *words[1:]])
    return found


def test_every_command_composes():
    assert len(commands()) >= 12
    for python, door, *words in commands():
        assert python == "python"
        assert (ROOT / door).is_file()
        named = [word.partition("=")[2] for word in words if word.startswith("--config-name=")]
        compose(ROOT / "configs", (named or ["eval.yaml"])[0], [word for word in words if not word.startswith("--")])


def test_what_reads_a_ledger_reads_that_of_a_run_that_keeps_one_and_leaves_it_whole():
    """A request purges the ledger that it reads, unless it is told not to: the next example reads the same."""
    keeps = [words for words in commands() if "ledger.enabled=true" in words]
    names = {word.partition("=")[2] for words in keeps for word in words if word.startswith("task_name=")}
    (snippet,) = (text for language, text in blocks() if language == "python")
    assert set(re.findall(r"saves/finetune/(\w+)", snippet)) <= names
    on = [
        words
        for words in commands()
        if any(word.endswith(f"saves/finetune/{name}") for word in words for name in names)
    ]
    unlearning = [words for words in on if "--config-name=unlearn-lora.yaml" in words]
    assert len(unlearning) > 1
    assert all("ledger.purge=false" in words for words in unlearning)


@pytest.mark.slow
def test_every_block_runs_in_order(tmp_path):
    for name in ("src", "configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = ["set -euo pipefail"]
    for language, text in blocks():
        script.append(text if language == "bash" else f"python - <<'END'\n{text}END\n")
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["env", f"PATH={path}", "bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "saves" / "eval" / "undone" / "TOFU_EVAL.json").is_file()
