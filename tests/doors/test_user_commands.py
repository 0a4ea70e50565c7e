"""The user's own command lines, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_eval import SHARED, needs_shared
from helpers_runs import SMALL, adapter_bytes, adapter_tensors
from peft import PeftModel
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]


def run(door: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a door as a user does, from the project's root."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, door, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def logits(base: Path, adapter: Path | None) -> torch.Tensor:
    """Logits of 3 rows of 12 ids, by transformers and plain PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.arange(36).reshape(3, 12)).logits


def places(pocket, saves: Path) -> tuple[str, ...]:
    return (f"tofu_path={pocket.data}", f"paths.saves_dir={saves}", f"paths.cache_dir={saves}/cache", *SMALL)


def base_of(pocket) -> str:
    return f"model.model_args.pretrained_model_name_or_path={pocket.model}"


def test_fine_tune_unlearn_and_evaluate_by_command_line(pocket, saves):
    """The fault of the field: with learning rate 0 unlearning must leave the fine-tuned model's logits, not the base's."""
    here = places(pocket, saves)
    run(
        "src/fed_train.py",
        "--config-name=train-lora.yaml",
        "experiment=finetune/tofu/pocket",
        "task_name=ft",
        base_of(pocket),
        *here,
    )
    tuned = saves / "finetune" / "ft"
    still = ("--config-name=unlearn-lora.yaml", "experiment=unlearn/tofu/pocket", "trainer.args.learning_rate=0", *here)
    by_run = f"model.model_args.pretrained_model_name_or_path={tuned}"
    run("src/fed_train.py", *still, "task_name=by_run", by_run)
    run(
        "src/fed_train.py",
        *still,
        "task_name=by_path",
        base_of(pocket),
        f"model.model_args.lora_model_path={tuned}/adapter",
    )
    fine, bare = logits(pocket.model, tuned / "adapter"), logits(pocket.model, None)
    assert (fine - bare).abs().max() > 1e-3
    for name in ("by_run", "by_path"):
        assert torch.equal(logits(pocket.model, saves / "unlearn" / name / "adapter"), fine)
    few = ("eval.max_rows=2", "eval.max_new_tokens=4", f"tofu_path={pocket.data}", f"paths.saves_dir={saves}")
    run("src/eval.py", "experiment=eval/tofu/pocket", "task_name=e", by_run, "model.model_args.lora_config.r=4", *few)
    log = json.loads((saves / "eval" / "e" / "TOFU_EVAL.json").read_text())
    assert log["provenance"]["trial"] is True
    assert log["forget_Q_A_Prob"]["agg_value"] > 0


@pytest.mark.slow
@needs_shared
def test_real_tofu_over_a_real_llama(saves):
    base = SHARED / "models" / "stories260K"
    command = (
        "--config-name=unlearn-lora.yaml", "experiment=unlearn/tofu/default", f"tofu_path={SHARED / 'tofu'}", "model=stories260K-lora",
        "forget_split=forget01", "retain_split=retain99", "trainer.args.max_steps=2", "trainer.federated.num_rounds=2", "eval.max_rows=4",
        f"paths.saves_dir={saves}", f"paths.cache_dir={saves}/cache",
    )  # fmt: skip
    run("src/fed_train.py", *command, "task_name=x", f"model.model_args.pretrained_model_name_or_path={base}")
    first = saves / "unlearn" / "x"
    assert any(tensor.any() for name, tensor in adapter_tensors(first).items() if "lora_B" in name)
    assert not torch.equal(logits(base, first / "adapter"), logits(base, None))
    run("src/fed_train.py", *command, "task_name=y", f"model.model_args.pretrained_model_name_or_path={first}")
    again = (
        f"model.model_args.pretrained_model_name_or_path={base}",
        f"model.model_args.lora_model_path={first}/adapter",
    )
    run("src/fed_train.py", *command, "task_name=z", *again)
    assert adapter_bytes(saves / "unlearn" / "y") == adapter_bytes(saves / "unlearn" / "z")
    assert adapter_bytes(saves / "unlearn" / "y") != adapter_bytes(first)
