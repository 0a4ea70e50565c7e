"""The demo itself: what it shows holds, and the control without a forget loss misses it."""

import json
from pathlib import Path

import pytest
from helpers_runs import CONFIGS

from fedunlearn.doors.compose import compose
from fedunlearn.doors.demo import run_demo
from fedunlearn.doors.stages import run_federated
from fedunlearn.reporting.console import figures

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo of seed 0 in a folder of its own; the pocket is the project's, built where it is not yet."""
    saves = tmp_path_factory.mktemp("demo")
    return saves, run_demo(0, CONFIGS, saves, ROOT / "saves" / "pocket", seconds_so_far=0.0)


@pytest.fixture(scope="module")
def control(demo, tmp_path_factory):
    """The unlearning recipe with a forget loss that is always zero: same protocol, rows, draws and steps."""
    saves, _ = demo
    composed = compose(
        CONFIGS,
        "unlearn-lora.yaml",
        [
            "experiment=unlearn/tofu/pocket",
            "method=grad_ascent",
            "method._target_=helpers_methods.RetainOnly",
            "task_name=control",
            f"paths.saves_dir={saves}",
            f"paths.pocket_dir={ROOT / 'saves' / 'pocket'}",
            f"paths.cache_dir={saves}/cache",
            f"model.model_args.pretrained_model_name_or_path={saves}/finetune/finetuned",
            f"retain_logs_path={saves}/eval/oracle/TOFU_EVAL.json",
        ],
    )
    return figures(run_federated(composed))


def judge(unlearned, summary):
    """What unlearning has to reach, by name."""
    tuned, oracle, base = summary["finetuned"], summary["oracle"], summary["base"]
    return {
        "learned": tuned["forget_Q_A_Prob"] >= max(0.75, 2 * oracle["forget_Q_A_Prob"]),
        "forgot": 0.2 <= unlearned["forget_Q_A_Prob"] / oracle["forget_Q_A_Prob"] <= 1.2,
        "kept": unlearned["model_utility"] >= 0.9 * tuned["model_utility"],
        "useful": tuned["model_utility"] >= 1.5 * base["model_utility"],
        "quality": unlearned["forget_quality"] >= max(1e-2, 1e4 * tuned["forget_quality"]),
    }


def test_the_demo_unlearns(demo):
    saves, summary = demo
    assert all(judge(summary["unlearned"], summary).values()), judge(summary["unlearned"], summary)
    assert json.loads((saves / "summary.json").read_text()) == summary
    assert summary["seed"] == 0
    assert set(summary["bytes"]) == {"finetuned", "oracle", "unlearned"}


def test_the_control_without_a_forget_loss_misses_it(demo, control):
    _, summary = demo
    verdict = judge(control, summary)
    assert not verdict["forgot"], verdict
    assert not verdict["quality"], verdict
    assert verdict["kept"], verdict


def test_the_unlearned_adapter_differs_from_where_it_began(demo):
    saves, _ = demo
    first = (saves / "finetune" / "finetuned" / "adapter" / "adapter_model.safetensors").read_bytes()
    last = (saves / "unlearn" / "unlearned" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert first != last
