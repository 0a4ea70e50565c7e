"""The global adapter's evaluation while a run goes on."""

import json
import shutil

import pytest
from helpers_runs import adapter_bytes, finetune, history, tiny, unlearn

from fedunlearn.errors import UserError

EVERY = ("eval.every_n_rounds=1", "eval.round_rows=3", "trainer.federated.num_rounds=3")
METRICS = {"forget_Q_A_Prob", "retain_Q_A_Prob"}


@pytest.mark.parametrize(
    "more", [(), ("launcher.isolate=true",), ("aggregation=flora",)], ids=["local", "isolate", "sidecar"]
)
def test_it_changes_no_byte_of_the_result_and_stands_in_history(pocket, saves, more):
    plain = finetune(pocket, saves, "plain", "trainer.federated.num_rounds=3", *more)
    seen = finetune(pocket, saves, "seen", *EVERY, *more)
    assert adapter_bytes(seen) == adapter_bytes(plain)
    lines = history(seen)
    assert [set(line["evaluation"]) for line in lines] == [METRICS] * 3
    assert len({line["evaluation"]["retain_Q_A_Prob"] for line in lines}) == 3
    assert [line["evaluation"] for line in history(plain)] == [{}] * 3
    assert [line["adapter_hash"] for line in lines] == [line["adapter_hash"] for line in history(plain)]


def test_a_reference_and_a_method_s_own_draws_are_not_disturbed(pocket, saves):
    tuned = finetune(pocket, saves, "ft")
    for method in ("method=npo", "method=rmu"):
        runs = [unlearn(pocket, saves, tuned, f"{method[7:]}{len(more)}", method, *more) for more in ((), EVERY[:2])]
        assert adapter_bytes(runs[0]) == adapter_bytes(runs[1])


def test_every_second_round_and_the_same_figures_after_a_resume(pocket, saves):
    asked = (
        "eval.every_n_rounds=2",
        "eval.round_rows=3",
        "trainer.federated.num_rounds=4",
        "trainer.federated.keep_rounds=all",
    )
    run = finetune(pocket, saves, "whole", *asked)
    before = [line["evaluation"] for line in history(run)]
    assert [bool(one) for one in before] == [False, True, False, True]
    for number in (3, 4):
        shutil.rmtree(run / "rounds" / f"{number:04d}")
    (run / "done.json").unlink()
    finetune(pocket, saves, "whole", *asked, "resume=true")
    assert [line["evaluation"] for line in history(run)] == before


def test_all_rows_of_the_last_round_are_the_evaluation_of_the_result(pocket, saves):
    asked = ("eval.every_n_rounds=2", "eval.round_rows=null", "eval.round_metrics=[model_utility,forget_Q_A_Prob]")
    run = finetune(pocket, saves, "ft", *asked, "eval.at_end=true", "eval.max_new_tokens=2")
    found = history(run)[-1]["evaluation"]
    log = json.loads((run / "TOFU_EVAL.json").read_text())
    assert "retain_Q_A_ROUGE" in found  # model_utility is made of it
    for name, value in found.items():
        assert value == pytest.approx(log[name]["agg_value"], abs=1e-6), name


def test_curves_hold_it(pocket, saves):
    tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = finetune(pocket, saves, "ft", *EVERY, "trainer.args.report_to=tensorboard")
    events = tensorboard.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    curve = [scalar.value for scalar in events.Scalars("eval/forget_Q_A_Prob")]
    assert curve == pytest.approx([line["evaluation"]["forget_Q_A_Prob"] for line in history(run)])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("eval.round_metrics=[forget_quality]", "forget_quality compares with another model"),
        ("eval.round_metrics=[prob]", r"eval.round_metrics=\['prob'\] must name some of eval.metrics"),
        ("eval.round_metrics=[]", "must name some of eval.metrics"),
        ("eval.every_n_rounds=0", r"eval.every_n_rounds=0 must be at least 1 or null \(never\)"),
        ("eval.round_rows=0", r"eval.round_rows=0 must be at least 1 or null \(all rows\)"),
    ],
)
def test_what_cannot_be_is_refused(pocket, saves, override, said):
    with pytest.raises(UserError, match=said):
        tiny(pocket, saves, "finetune", "x", "eval.every_n_rounds=1", override)


@pytest.mark.parametrize(
    "asked",
    [
        ("eval=tofu_attacks", "eval.holdout_split=holdout10", "eval.gradnorm_of=adapter"),
        ("eval=tofu_reference", "eval.reference_model_path=MODEL"),
    ],
)
def test_what_a_round_does_not_read_the_whole_evaluation_may(pocket, saves, asked):
    asked = tuple(one.replace("MODEL", str(pocket.model)) for one in asked)
    run = finetune(pocket, saves, "ft", *EVERY, "trainer.federated.num_rounds=1", *asked)
    assert set(history(run)[0]["evaluation"]) == METRICS
