"""docs/add-a-method.md, done as it says: a method from outside the package, named by `_target_` alone, unlearns."""

import json
import re
import sys
from pathlib import Path

import pytest
from helpers_runs import adapter_bytes, finetune, tiny, unlearn

from fedunlearn.doors.stages import run_federated
from fedunlearn.errors import UserError

DOCUMENT = Path(__file__).parents[2] / "docs" / "add-a-method.md"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The document's classes as its files, in a package on the import path."""
    text = DOCUMENT.read_text(encoding="utf-8")
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, code in zip(("flatten", "shrink"), re.findall(r"```python\n(.*?)```", text, re.S), strict=True):
        assert f"`mine/{name}.py`" in text
        (package / f"{name}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in ("mine.flatten", "mine.shrink", "mine"):
        sys.modules.pop(name, None)


def test_the_documents_method_unlearns_by_its_target_alone(pocket, saves, mine):
    tuned = finetune(pocket, saves)
    method = ("method=grad_diff", "method._target_=mine.flatten.Flatten", "method.gamma=0.1", "method.retain=kl")
    composed = tiny(
        pocket, saves, "unlearn", "flat", f"model.model_args.pretrained_model_name_or_path={tuned}", *method
    )
    assert (type(composed.run.method).__name__, composed.run.method.gamma) == ("Flatten", 0.1)
    run_federated(composed)
    lines = [json.loads(line) for line in (saves / "unlearn" / "flat" / "history.jsonl").read_text().splitlines()]
    assert all(client["reason"] == "" for line in lines for client in line["clients"])
    assert any(client["role"] == "unlearn" and client["weight"] > 0 for line in lines for client in line["clients"])
    assert lines[-1]["adapter_hash"] != lines[0]["adapter_hash"]


def test_the_documents_server_side_method_takes_its_share_back(pocket, saves, mine):
    """share 1 leaves the adapter as it was, share 0 does not."""
    tuned = finetune(pocket, saves)
    method = ("method=rollback", "method._target_=mine.shrink.Shrink", "trainer.federated.num_rounds=1")
    whole, nothing = (
        unlearn(pocket, saves, tuned, f"shrunk{share}", *method, f"+method.share={share}") for share in (1.0, 0.0)
    )
    assert adapter_bytes(whole) == adapter_bytes(tuned)
    assert adapter_bytes(nothing) != adapter_bytes(tuned)


def test_a_server_side_method_with_a_change_and_no_round_for_it_is_refused(pocket, saves, mine, monkeypatch):
    from mine.shrink import Shrink

    monkeypatch.delattr(Shrink, "step")
    method = ("method=rollback", "method._target_=mine.shrink.Shrink", "+method.share=0.5")
    with pytest.raises(UserError, match=r"method Shrink: change is asked for in rounds whose step says ServerStep.OWN"):
        tiny(pocket, saves, "unlearn", "x", *method)
