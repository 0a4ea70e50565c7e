"""A whole evaluation on a made-up TOFU with a tiny model: names, rows, retain logs, trials."""

import json
from dataclasses import replace

import pytest
import torch
from helpers_eval import (
    LLAMA3_ARGS,
    SHARED,
    evaluate_tofu,
    llama3_tokenizer,
    metrics_of,
    needs_shared,
    tiny_chat,
    tiny_llama,
    write_folder,
)

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.data.chat import ChatFormat
from fedunlearn.data.tofu import load_tofu
from fedunlearn.errors import UserError
from fedunlearn.evals.files import read_log, write_log
from fedunlearn.evals.generation import clean, decode
from fedunlearn.evals.retain_log import check_retain_log
from fedunlearn.evals.scoring import score_rows
from fedunlearn.evals.sets import read_sets
from fedunlearn.records.evaluation import Detail, MetricResult

SETTINGS = EvalConfig(max_new_tokens=4, metrics=metrics_of())
COMPAT = replace(SETTINGS, compat="open-unlearning")


@pytest.fixture(scope="module")
def tofu(tmp_path_factory):
    return load_tofu(str(write_folder(tmp_path_factory.mktemp("tofu"))))


def forget_set(tofu, split):
    return read_sets(tofu, split, SETTINGS)["forget"]


def evaluate(tofu, settings=SETTINGS, retain_log=None, seed=0, forget_split="forget10"):
    return evaluate_tofu(tiny_llama(seed), tiny_chat(), tofu, forget_split, settings, retain_log, {"base": "tiny"})


@pytest.fixture(scope="module")
def log(tofu):
    return evaluate(tofu)


def test_every_base_metric_is_there_with_its_rows(log):
    """4 forget rows, 6 retain rows, 3 real authors, 3 world facts."""
    rows = {name: len(result.value_by_index) for name, result in log.metrics.items()}
    assert rows == {
        "exact_memorization": 4,
        "extraction_strength": 4,
        "forget_Q_A_PARA_Prob": 4,
        "forget_Q_A_PERT_Prob": 4,
        "forget_Q_A_Prob": 4,
        "forget_Q_A_ROUGE": 4,
        "forget_quality": 0,
        "forget_truth_ratio": 4,
        "model_utility": 0,
        "ra_Q_A_PERT_Prob": 3,
        "ra_Q_A_Prob": 3,
        "ra_Q_A_Prob_normalised": 3,
        "ra_Q_A_ROUGE": 3,
        "ra_Truth_Ratio": 3,
        "retain_Q_A_PARA_Prob": 6,
        "retain_Q_A_PERT_Prob": 6,
        "retain_Q_A_Prob": 6,
        "retain_Q_A_ROUGE": 6,
        "retain_Truth_Ratio": 6,
        "wf_Q_A_PERT_Prob": 3,
        "wf_Q_A_Prob": 3,
        "wf_Q_A_Prob_normalised": 3,
        "wf_Q_A_ROUGE": 3,
        "wf_Truth_Ratio": 3,
    }


def test_scores_land_at_their_row_and_answer(tofu, log):
    """Row 2 of forget10, its paraphrase and its fourth wrong answer, scored alone."""
    chat, row = tiny_chat(), tofu.perturbed("forget10")[2]
    texts = (row.answer, row.paraphrased_answer, row.perturbed_answers[3])
    rows = [chat.encode(row.question, text, "row") for text in texts]
    scores = score_rows(tiny_llama(), dict.fromkeys(rows, Detail.LOSS), pad_id=0, batch_tokens=1)
    alone = [scores[one] for one in rows]
    found = [log.metrics[f"forget_Q_A_{kind}Prob"].value_by_index[2]["avg_loss"] for kind in ("", "PARA_", "PERT_")]
    assert [found[0], found[1], found[2][3]] == pytest.approx([score.avg_loss for score in alone], abs=4e-6)


def test_texts_land_at_their_row(log, tofu):
    row = log.metrics["retain_Q_A_ROUGE"].value_by_index[3]
    assert row["input"].endswith("user\n\nWho is 1?assistant\n\n")
    assert row["ground_truth"] == "A3."
    assert tofu.rows("full")[3].answer == "A3 ."


def test_provenance_says_what_it_was_made_of(log, tofu):
    said = log.provenance
    assert (said["base"], said["forget_split"], said["definition"]) == ("tiny", "forget10", "log-space")
    assert said["data"]["forget10_perturbed"] == tofu.hash("forget10_perturbed")
    assert set(said["data"]) == {
        "forget10_perturbed",
        "retain_perturbed",
        "real_authors_perturbed",
        "world_facts_perturbed",
    }
    assert said["template"]["date_string"] == "10 Apr 2025"
    assert "trial" not in said


def test_the_same_model_twice_is_the_same_log(log, tofu):
    state = torch.get_rng_state()
    assert evaluate(tofu) == log
    assert torch.equal(torch.get_rng_state(), state)


def test_forget_quality_against_a_log_from_disk(log, tofu, tmp_path):
    write_log(log, tmp_path)
    oracle = read_log(tmp_path)
    assert evaluate(tofu, retain_log=oracle).metrics["forget_quality"].agg_value == 1.0
    assert 0 < evaluate(tofu, retain_log=oracle, seed=3).metrics["forget_quality"].agg_value <= 1.0


def test_a_trial_says_so_and_meets_its_like_only(log, tofu):
    settings = replace(SETTINGS, max_rows=2)
    trial = evaluate(tofu, settings)
    assert (trial.provenance["trial"], trial.provenance["max_rows"]) == (True, 2)
    assert {len(result.value_by_index) for result in trial.metrics.values()} == {0, 2}
    assert evaluate(tofu, settings, retain_log=trial).metrics["forget_quality"].agg_value == 1.0
    with pytest.raises(
        UserError,
        match=r"retain_logs_path: the log was made with eval.max_rows=2, this evaluation has None; make the two equal",
    ):
        evaluate(tofu, retain_log=trial)
    with pytest.raises(UserError, match=r"eval.max_rows=None, this evaluation has 2"):
        evaluate(tofu, settings, retain_log=log)


def test_another_definition_is_refused_with_the_way_out(log, tofu):
    with pytest.raises(
        UserError,
        match=r"follows the definitions 'log-space' of forget_truth_ratio, this evaluation 'open-unlearning'; set eval.compat=null",
    ):
        evaluate(tofu, COMPAT, retain_log=log)
    theirs = evaluate(tofu, COMPAT)
    with pytest.raises(
        UserError,
        match=r"'open-unlearning' of forget_truth_ratio, this evaluation 'log-space'; set eval.compat=open-unlearning",
    ):
        evaluate(tofu, retain_log=theirs)
    assert evaluate(tofu, COMPAT, retain_log=theirs).metrics["forget_quality"].agg_value == 1.0


def test_another_forget_split_or_other_data_is_refused(log, tofu, tmp_path):
    with pytest.raises(UserError, match="the log is of forget_split='forget05', this evaluation of 'forget10'"):
        evaluate(tofu, retain_log=evaluate(tofu, forget_split="forget05"))
    other = load_tofu(str(write_folder(tmp_path / "other", authors=40, rows_per_author=1)))
    with pytest.raises(UserError, match="other rows of forget10_perturbed than these"):
        check_retain_log(log, forget_set(other, "forget10"), SETTINGS)


def test_a_foreign_log_is_told_by_its_row_count(log, tofu):
    ratio = replace(log.metrics["forget_truth_ratio"], definition="open-unlearning")
    foreign = replace(log, provenance={}, metrics={"forget_truth_ratio": ratio})
    check_retain_log(foreign, forget_set(tofu, "forget10"), COMPAT)
    short = replace(foreign, metrics={"forget_truth_ratio": replace(ratio, value_by_index=ratio.value_by_index[:3])})
    with pytest.raises(
        UserError, match=r"the log has 3 forget rows, forget_split='forget10' has 4; give the log .* retain90"
    ):
        check_retain_log(short, forget_set(tofu, "forget10"), COMPAT)
    with pytest.raises(UserError, match="the log has no forget_truth_ratio, which forget_quality compares with"):
        check_retain_log(replace(foreign, metrics={"model_utility": ratio}), forget_set(tofu, "forget10"), COMPAT)


def test_a_retain_log_is_checked_before_the_model_is_asked(log, tofu):
    with pytest.raises(UserError, match="definitions"):
        evaluate_tofu(torch.nn.Linear(1, 1), tiny_chat(), tofu, "forget10", COMPAT, log, {})


def test_a_row_that_does_not_fit_is_named(tofu):
    with pytest.raises(UserError, match=r"forget10_perturbed row 0 has \d+ tokens .*data.max_length=100"):
        evaluate_tofu(tiny_llama(), tiny_chat(100), tofu, "forget10", SETTINGS, None, {})


def test_forget_rows_without_paraphrase_are_refused(tmp_path):
    folder = write_folder(tmp_path)
    file = folder / "retain_perturbed.json"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text(
        "\n".join(json.dumps({key: row[key] for key in row if key != "paraphrased_answer"}) for row in rows)
    )
    with pytest.raises(
        UserError, match=r"retain_perturbed row 0 must have a column 'paraphrased_answer'.*correct the file"
    ):
        evaluate(load_tofu(str(folder)))


@needs_shared
def test_a_published_log_serves_as_retain_log_of_its_split_only():
    tofu = load_tofu(str(SHARED / "tofu"))
    published = read_log(SHARED / "golden/tofu_Llama-3.2-1B-Instruct_retain95/TOFU_EVAL.json")
    check_retain_log(published, forget_set(tofu, "forget05"), COMPAT)
    with pytest.raises(UserError, match="the log has 200 forget rows, forget_split='forget10' has 400"):
        check_retain_log(published, forget_set(tofu, "forget10"), COMPAT)


@needs_shared
def test_prompts_and_truths_are_the_published_texts():
    """Every "input" and "ground_truth" of the golden forget10 log, from Llama-3's tokenizer and the section's template."""
    chat = ChatFormat(llama3_tokenizer(), LLAMA3_ARGS, 512)
    published = read_log(SHARED / "golden/tofu_Llama-3.2-1B-Instruct_retain90/TOFU_EVAL.json")
    for name, data in read_sets(load_tofu(str(SHARED / "tofu")), "forget10", SETTINGS).items():
        rows = published.metrics[f"{name}_Q_A_ROUGE"].value_by_index
        assert [decode(chat, chat.prompt(row.question)) for row in data.rows] == [row["input"] for row in rows]
        assert [clean(row.answer).strip() for row in data.rows] == [row["ground_truth"] for row in rows]


def test_a_log_without_the_numbers_that_are_read_is_refused(log, tofu):
    forget, ratio = forget_set(tofu, "forget10"), log.metrics["forget_truth_ratio"]
    worded = replace(ratio, value_by_index=({"score": "bad"}, *ratio.value_by_index[1:]))
    with pytest.raises(UserError, match="the log has no forget_truth_ratio with a score a row"):
        check_retain_log(replace(log, metrics={"forget_truth_ratio": worded}), forget, SETTINGS)
    with pytest.raises(UserError, match=r"does not say which rows it was made on \(provenance.data\)"):
        check_retain_log(replace(log, provenance={**log.provenance, "data": "x"}), forget, SETTINGS)
    attacks = replace(SETTINGS, metrics=metrics_of("tofu", "tofu_attacks"))
    for auc in (None, 7.0, -0.1):
        named = replace(log, metrics={**log.metrics, "mia_min_k": MetricResult(auc, "log-space")})
        with pytest.raises(
            UserError, match=f"the log has mia_min_k={auc}, where privleak wants an AUC between 0 and 1"
        ):
            check_retain_log(named, forget, attacks)
