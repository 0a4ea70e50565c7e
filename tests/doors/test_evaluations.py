"""Evaluations by the door: several adapters on one base, what is kept between them, attacks, another model to compare with, metrics of the user's own."""

import json

import pytest
import safetensors.numpy
from helpers_runs import CONFIGS, finetune

from fedunlearn.doors.compose import changed, compose
from fedunlearn.doors.evaluation import run_evaluation, run_evaluations
from fedunlearn.errors import UserError
from fedunlearn.evals import evidence
from fedunlearn.models import resident


@pytest.fixture
def evaluation(pocket, saves):
    """Composes an evaluation of a run."""

    def composed(task, start, *overrides):
        places = (
            f"tofu_path={pocket.data}", f"paths.saves_dir={saves}", f"paths.cache_dir={saves}/cache", f"paths.pocket_dir={saves}/pocket",
            "eval.max_new_tokens=2", "model.model_args.lora_config.r=4", f"task_name={task}",
        )  # fmt: skip
        named = () if start is None else (f"model.model_args.pretrained_model_name_or_path={start}",)
        return compose(CONFIGS, "eval.yaml", ["experiment=eval/tofu/pocket", *places, *named, *overrides])

    return composed


@pytest.fixture
def asked(monkeypatch):
    """The passes that really asked the model, by name, with the number of rows."""
    calls = []

    def noting(name, real):
        def noted(model, rows_or_chat, *rest, **more):
            rows = rest[0] if name == "generate_texts" else rows_or_chat
            calls.append((name, len(rows)))
            return real(model, rows_or_chat, *rest, **more)

        return noted

    for name in ("score_rows", "generate_texts", "gradient_norms"):
        monkeypatch.setattr(evidence, name, noting(name, getattr(evidence, name)))
    return calls


def log_of(saves, task):
    return json.loads((saves / "eval" / task / "TOFU_EVAL.json").read_text())


def without_config(log):
    return {**log, "provenance": {**log["provenance"], "config_hash": ""}}


def figures_of(log):
    """Aggregates; rows scored in other company differ by float32's rounding."""
    return known({name: metric["agg_value"] for name, metric in log.items() if name != "provenance"})


def known(values):
    return {name: -1.0 if value is None else value for name, value in values.items()}


def test_a_second_evaluation_of_the_same_adapter_asks_the_model_nothing(pocket, saves, evaluation, asked):
    tuned = finetune(pocket, saves, "ft")
    run_evaluation(evaluation("first", tuned, "eval=tofu_attacks"))
    assert {name for name, _ in asked} == {"score_rows", "generate_texts", "gradient_norms"}
    asked.clear()
    run_evaluation(evaluation("second", tuned, "eval=tofu_attacks"))
    assert asked == []
    assert without_config(log_of(saves, "second")) == without_config(log_of(saves, "first"))
    run_evaluation(evaluation("compat", tuned, "eval.compat=open-unlearning"))
    assert {name for name, _ in asked} == {"score_rows", "generate_texts"}


def test_attacks_after_base_metrics_ask_only_for_what_is_new(pocket, saves, evaluation, asked):
    """The forget answers are scored again for their moments, the holdout's for the first time; nothing is generated."""
    tuned = finetune(pocket, saves, "ft")
    run_evaluation(evaluation("base", tuned))
    asked.clear()
    log = run_evaluation(evaluation("attacks", tuned, "eval=tofu_attacks"))
    rows = len(log.metrics["mia_min_k"].parts["forget"].value_by_index)
    assert sorted(asked) == [
        ("gradient_norms", rows),
        ("gradient_norms", rows),
        ("score_rows", rows),
        ("score_rows", rows),
    ]


def test_an_interrupted_evaluation_goes_on_at_the_tables_it_has(pocket, saves, evaluation, asked, monkeypatch):
    """Stopped in its second data set: the first is not scored again, and nothing but the cache was written."""
    tuned, real, calls = finetune(pocket, saves, "ft"), evidence.score_rows, []

    def stopping(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(evidence, "score_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(evaluation("ev", tuned))
    assert not (saves / "eval").exists()
    calls.clear()
    calls += [1, 1]
    run_evaluation(evaluation("ev", tuned))
    assert len(calls) == 2 + 3  # three of four data sets
    monkeypatch.setattr(evidence, "score_rows", real)
    fresh = run_evaluation(evaluation("fresh", tuned, f"paths.cache_dir={saves}/other"))
    wanted = known({name: metric.agg_value for name, metric in fresh.metrics.items()})
    assert figures_of(log_of(saves, "ev")) == pytest.approx(wanted, rel=1e-5)


def test_a_damaged_table_is_computed_anew_and_told(pocket, saves, evaluation, asked, caplog):
    tuned = finetune(pocket, saves, "ft")
    run_evaluation(evaluation("first", tuned))
    tables = sorted((saves / "cache" / "evaluations").rglob("*.safetensors"))
    tables[0].write_bytes(tables[0].read_bytes()[:100])
    asked.clear()
    run_evaluation(evaluation("second", tuned))
    assert [name for name, _ in asked] == ["score_rows"]
    assert f"{tables[0]} is damaged" in caplog.text
    assert figures_of(log_of(saves, "second")) == pytest.approx(figures_of(log_of(saves, "first")), rel=1e-5)


def test_a_table_that_was_altered_is_not_believed(pocket, saves, evaluation, asked, caplog):
    tuned = finetune(pocket, saves, "ft")
    first = run_evaluation(evaluation("first", tuned, "eval=tofu_attacks"))
    cache = saves / "cache" / "evaluations"
    table, texts = next(cache.rglob("*-moments.safetensors")), next(cache.rglob("texts-*/*.json"))
    tensors = safetensors.numpy.load_file(table)
    with safetensors.safe_open(table, "numpy") as file:
        seal = file.metadata()
    table.write_bytes(safetensors.numpy.save({**tensors, "num_labels": tensors["num_labels"] * 100}, seal))
    saved = json.loads(texts.read_text())
    texts.write_text(json.dumps({**saved, "values": dict.fromkeys(saved["values"], 7)}))
    asked.clear()
    second = run_evaluation(evaluation("second", tuned, "eval=tofu_attacks"))
    assert {name for name, _ in asked} == {"score_rows", "generate_texts"}
    assert all(f"{path} is damaged" in caplog.text for path in (table, texts))
    wanted = known({name: metric.agg_value for name, metric in first.metrics.items()})
    assert known({n: metric.agg_value for n, metric in second.metrics.items()}) == pytest.approx(wanted, rel=1e-4)


def test_a_folder_in_the_place_of_a_table_is_told(pocket, saves, evaluation):
    tuned = finetune(pocket, saves, "ft")
    run_evaluation(evaluation("first", tuned))
    table = next((saves / "cache" / "evaluations").rglob("*.safetensors"))
    table.unlink()
    table.mkdir()
    with pytest.raises(UserError, match=f"{table}.*is no file of this cache"):
        run_evaluation(evaluation("second", tuned))
    assert not (saves / "eval" / "second").exists()


def test_a_truth_ratio_takes_the_answers_it_names_whatever_else_is_scored(pocket, saves, evaluation):
    tuned = finetune(pocket, saves, "ft")
    plain = "eval.metrics.forget_truth_ratio.paraphrased=false"
    beside, alone, other = (
        run_evaluation(evaluation(name, tuned, *more)).metrics["forget_truth_ratio"].agg_value
        for name, more in (("a", (plain,)), ("b", (plain, "~eval.metrics.forget_Q_A_PARA_Prob")), ("c", ()))
    )
    assert beside == pytest.approx(alone, rel=1e-5)
    assert beside != pytest.approx(other, rel=1e-3)


def test_a_model_that_says_nan_is_named_where_texts_alone_are_read(pocket, saves, evaluation):
    """Its numbers are finite, as those of any adapter that is read; their product is not."""
    tuned = finetune(pocket, saves, "ft")
    weights = tuned / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    broken = saves / "broken"
    broken.mkdir(parents=True)
    (broken / "adapter_config.json").write_text((tuned / "adapter" / "adapter_config.json").read_text())
    (broken / "adapter_model.safetensors").write_bytes(
        safetensors.numpy.save(
            {name: values * values.dtype.type(1e30) for name, values in tensors.items()}, {"format": "pt"}
        )
    )
    composed = evaluation("x", broken)
    metrics = {"forget_Q_A_ROUGE": composed.plain["eval"]["metrics"]["forget_Q_A_ROUGE"]}
    composed = changed(composed, {"eval": {**composed.plain["eval"], "metrics": metrics}})
    with pytest.raises(UserError, match=r"the prompt that ends in '.+': the model's logits are not finite"):
        run_evaluation(composed)
    assert not (saves / "eval").exists()
    assert not list((saves / "cache").rglob("texts-*/*.json"))


def test_three_adapters_cost_one_load_of_the_base(pocket, saves, evaluation, monkeypatch):
    runs = [finetune(pocket, saves, f"ft{seed}", f"trainer.args.seed={seed}") for seed in range(3)]
    alone = [run_evaluation(evaluation(f"alone{k}", run, f"paths.cache_dir={saves}/a")) for k, run in enumerate(runs)]
    resident.release()
    loads, real = [], resident.load_base
    monkeypatch.setattr(resident, "load_base", lambda *a: loads.append(1) or real(*a))
    found = run_evaluations(evaluation("all", None, f"adapters=[{','.join(map(str, runs))}]"))
    assert len(loads) == 1
    assert [folder.name for folder in found] == ["all.1", "all.2", "all.3"]
    assert len({log.metrics["forget_Q_A_Prob"].agg_value for log in found.values()}) == 3
    for log, one in zip(found.values(), alone, strict=True):
        wanted = known({name: metric.agg_value for name, metric in one.metrics.items()})
        assert known({n: metric.agg_value for n, metric in log.metrics.items()}) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("adapters=[]",), r"adapters=\[\] names none"),
        (("adapters=[a,a]",), "names one twice"),
        (
            ("adapters=[a,b]", "model.model_args.lora_model_path=c"),
            r"lora_model_path='c' beside adapters, which stand in its place",
        ),
        (("eval.every_n_rounds=1",), "an evaluation has no rounds; leave them null"),
        (("eval.clients_every_n_rounds=1",), "an evaluation has no rounds; leave them null"),
    ],
)
def test_what_has_no_sense_in_an_evaluation_is_refused(evaluation, overrides, said):
    with pytest.raises(UserError, match=said):
        evaluation("x", None, *overrides)


def test_one_adapter_that_is_not_there_is_told_before_any_is_evaluated(pocket, saves, evaluation, asked):
    tuned = finetune(pocket, saves, "ft")
    with pytest.raises(UserError, match="nowhere"):
        run_evaluations(evaluation("all", None, f"adapters=[{tuned},{saves}/nowhere]"))
    assert asked == []
    assert not (saves / "eval").exists()


def test_adapters_that_are_damaged_or_named_twice_are_told_before_any_is_evaluated(pocket, saves, evaluation, asked):
    tuned, other = finetune(pocket, saves, "ft"), finetune(pocket, saves, "other", "trainer.args.seed=5")
    weights = other / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        run_evaluations(evaluation("all", None, f"adapters=[{tuned},{other},{tuned}/adapter]"))
    damaged, twice = caught.value.faults
    assert "is corrupt or truncated" in damaged
    assert twice.startswith("adapters[2]=")
    assert asked == []
    assert not (saves / "eval").exists()


def test_the_attack_against_another_model_reads_that_model(pocket, saves, evaluation):
    tuned, other = finetune(pocket, saves, "ft"), finetune(pocket, saves, "other", "trainer.args.seed=5")
    log = run_evaluation(evaluation("ev", tuned, "eval=tofu_reference", f"eval.reference_model_path={other}"))
    theirs = run_evaluation(evaluation("theirs", other, "eval=tofu_attacks"))
    for side in ("forget", "holdout"):
        mine, its = (one.metrics["mia_loss"].parts[side].column("score") for one in (log, theirs))
        wanted = [a - b for a, b in zip(mine, its, strict=True)]
        assert log.metrics["mia_reference"].parts[side].column("score") == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("eval=tofu_reference",), "reference_model_path"),
        (("eval.reference_model_path=x",), "no metric compares with it: leave it null, or choose eval=tofu_reference"),
        (("eval=tofu_reference", "eval.reference_model_path=null"), "compares with another model"),
        (("~eval.metrics.retain_Q_A_ROUGE",), "model_utility is made of 'retain_Q_A_ROUGE'"),
        (("+eval.metrics.mine._target_=fedunlearn.metrics.rouge.Rogue",), "Rogue"),
        (("+eval.metrics.mine={_target_: fedunlearn.metrics.rouge.Rouge, of: forget, score: rouge9}",), "rouge9"),
        (("eval=tofu_attack",), r"tofu_attacks"),
        (("eval.question_key=other",), "question_key"),
        (("eval.holdout_split=holdout10",), "no metric reads the holdout: leave it null, or choose eval=tofu_attacks"),
        (("eval.gradnorm_of=adapter",), "no metric takes gradients: leave it at model"),
        (("eval.metrics.model_utility.parts=[]",), r"parts=\[\] leaves nothing to take the mean of"),
        (("~eval.metrics",), "eval.metrics is empty and lm_eval null: nothing would be evaluated"),
        (("max_length=1",), "max_length=1 must be at least 2 tokens"),
        (
            ("+eval.metrics.provenance={_target_: fedunlearn.metrics.probability.Probability, of: forget}",),
            "eval.metrics.provenance is the name of a block in the result's file",
        ),
    ],
)
def test_what_cannot_be_composed_is_refused(evaluation, overrides, said):
    with pytest.raises(UserError, match=said):
        evaluation("x", None, *overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("eval=tofu_attacks", "eval.holdout_split=holdout05"), r"eval.holdout_split='holdout05' beside forget_split='forget10'"),
        (("+eval.metrics.mine={_target_: fedunlearn.metrics.rouge.Rouge, of: forgot}",), r"eval.metrics.mine reads the data set 'forgot', which TOFU has not"),
        (("eval=tofu_reference", "eval.reference_model_path=nowhere/at/all"), r"nowhere/at/all"),
        (("+eval.metrics.mine={_target_: fedunlearn.metrics.truth_ratio.TruthRatio, of: ra, kind: retain, paraphrased: true}",), "mine reads 'paraphrased' of 'ra', and real_authors_perturbed has none"),
        (("+eval.metrics.mine={_target_: fedunlearn.metrics.truth_ratio.TruthRatio, of: holdout, kind: retain, paraphrased: false}",), "mine reads 'perturbed' of 'holdout', and holdout10 has none"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_the_model_is_asked(
    pocket, saves, evaluation, asked, overrides, said
):
    tuned = finetune(pocket, saves, "ft")
    with pytest.raises(UserError, match=said):
        run_evaluation(evaluation("x", tuned, *overrides))
    assert asked == []
    assert not (saves / "eval").exists()


def test_a_metric_of_the_users_own_needs_no_edit_of_ours(pocket, saves, evaluation, tmp_path, monkeypatch):
    (tmp_path / "mine_metrics.py").write_text(
        """
from dataclasses import dataclass
from fedunlearn.metrics.base import Evidence, Metric, Part, Reading
from fedunlearn.records.evaluation import MetricResult

@dataclass(frozen=True, kw_only=True)
class LongestAnswer(Metric):
    of: str = "forget"

    @property
    def reads(self):
        return frozenset({Reading(self.of, Part.PLAIN)})

    def compute(self, found: Evidence) -> MetricResult:
        return MetricResult(float(max(s.num_labels for s in found.tables[self.of].plain)), self.definition(found.compat))
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    tuned = finetune(pocket, saves, "ft")
    log = run_evaluation(
        evaluation("ev", tuned, "+eval.metrics.longest={_target_: mine_metrics.LongestAnswer, of: wf}")
    )
    assert log.metrics["longest"].agg_value >= 2
    assert log_of(saves, "ev")["longest"] == {"agg_value": log.metrics["longest"].agg_value}


def test_the_paraphrased_question_is_asked_where_it_is_named(pocket, saves, evaluation):
    tuned = finetune(pocket, saves, "ft")
    plain = run_evaluation(evaluation("plain", tuned))
    asked = run_evaluation(evaluation("asked", tuned, "eval.question_key=paraphrased_question"))
    for name, changes in (("forget", True), ("retain", True), ("ra", False)):
        rows = [one.metrics[f"{name}_Q_A_ROUGE"].value_by_index for one in (plain, asked)]
        assert (rows[0][0]["input"] != rows[1][0]["input"]) == changes
    with pytest.raises(UserError, match=r"eval.question_key=question, this evaluation has paraphrased_question"):
        run_evaluation(
            evaluation(
                "x",
                tuned,
                "eval.question_key=paraphrased_question",
                f"retain_logs_path={saves}/eval/plain/TOFU_EVAL.json",
            )
        )
