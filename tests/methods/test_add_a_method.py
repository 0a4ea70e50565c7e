"""docs/add-a-method.md, done as it says: a method from outside the package, named by `_target_` alone, unlearns."""

import json
import re
import sys
from pathlib import Path

import pytest
from helpers_runs import finetune, tiny

from fedunlearn.doors.stages import run_federated

DOCUMENT = Path(__file__).parents[2] / "docs" / "add-a-method.md"


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The document's class as its file, in a package on the import path."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "`mine/flatten.py`" in text
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "flatten.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "mine.flatten.Flatten"
    for name in ("mine.flatten", "mine"):
        sys.modules.pop(name, None)


def test_the_documents_method_unlearns_by_its_target_alone(pocket, saves, toy):
    tuned = finetune(pocket, saves)
    method = ("method=grad_diff", f"method._target_={toy}", "method.gamma=0.1", "method.retain=kl")
    composed = tiny(
        pocket, saves, "unlearn", "flat", f"model.model_args.pretrained_model_name_or_path={tuned}", *method
    )
    assert (type(composed.run.method).__name__, composed.run.method.gamma) == ("Flatten", 0.1)
    run_federated(composed)
    lines = [json.loads(line) for line in (saves / "unlearn" / "flat" / "history.jsonl").read_text().splitlines()]
    assert all(client["reason"] == "" for line in lines for client in line["clients"])
    assert any(client["role"] == "unlearn" and client["weight"] > 0 for line in lines for client in line["clients"])
    assert lines[-1]["adapter_hash"] != lines[0]["adapter_hash"]
