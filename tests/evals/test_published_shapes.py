"""Files of ours beside the published ones: the same keys, nesting and types; and the published denominators from the tokens of ours."""

import json
from dataclasses import replace

import pytest
from helpers_eval import (
    ATTACKS,
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
from fedunlearn.evals.files import EVAL_FILE, SUMMARY_FILE, read_log, write_log
from fedunlearn.evals.retain_log import check_retain_log
from fedunlearn.evals.scoring import score_rows
from fedunlearn.evals.sets import read_sets
from fedunlearn.records.evaluation import Detail

pytestmark = needs_shared
FULL = "golden/tofu_Llama-3.2-1B-Instruct_full/evals_forget10"
SETTINGS = EvalConfig(
    max_new_tokens=4,
    metrics=metrics_of(*ATTACKS, "tofu_reference"),
    reference_model_path="another",
    compat="open-unlearning",
)


def shape(value):
    """Keys, nesting and types; the rows of a metric by their first, which all of them must be like."""
    if isinstance(value, dict) and "0" in value:
        shapes = [shape(row) for row in value.values()]
        assert list(value) == [str(i) for i in range(len(value))]
        assert all(one == shapes[0] for one in shapes)
        return {"rows": shapes[0]}
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])]
    return "number" if isinstance(value, int | float) else type(value).__name__


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    tofu, chat = load_tofu(str(write_folder(folder / "tofu"))), tiny_chat()
    rows = {"forget": tofu.perturbed("forget10"), "holdout": tofu.rows("holdout10")}
    reference = {}
    for name, split in rows.items():
        encoded = [chat.encode(row.question, row.answer, "row") for row in split]
        scores = score_rows(tiny_llama(3), dict.fromkeys(encoded, Detail.LOSS), pad_id=0, batch_tokens=512)
        reference[name] = tuple(scores[row] for row in encoded)
    other = evaluate_tofu(tiny_llama(4), chat, tofu, "forget10", SETTINGS, None, {}, reference=reference)
    log = evaluate_tofu(tiny_llama(), chat, tofu, "forget10", SETTINGS, other, {"base": "tiny"}, reference=reference)
    write_log(log, folder)
    return folder


def test_a_file_of_ours_has_the_keys_nesting_and_types_of_theirs(ours):
    mine = json.loads((ours / EVAL_FILE).read_text())
    theirs = json.loads((SHARED / FULL / EVAL_FILE).read_text())
    assert set(mine) == set(theirs) | {"provenance"}
    for name, metric in theirs.items():
        assert shape(mine[name]) == shape(metric), name


def test_so_has_the_summary(ours):
    mine, theirs = (json.loads((folder / SUMMARY_FILE).read_text()) for folder in (ours, SHARED / FULL))
    assert list(mine) == list(theirs)
    assert shape(mine) == shape(theirs)


@pytest.mark.parametrize("retain", ["99", "95", "90"])
def test_a_log_of_theirs_serves_every_metric_that_reads_one(retain):
    tofu, split = load_tofu(str(SHARED / "tofu")), {"99": "forget01", "95": "forget05", "90": "forget10"}[retain]
    log = read_log(SHARED / f"golden/tofu_Llama-3.2-1B-Instruct_retain{retain}/{EVAL_FILE}")
    check_retain_log(log, read_sets(tofu, split, SETTINGS)["forget"], SETTINGS)
    assert [name for name, one in SETTINGS.metrics.items() if one.reads_log] == ["forget_quality", "privleak"]
    ours_only = replace(SETTINGS, compat=None)
    with pytest.raises(Exception, match="follows the definitions 'open-unlearning' of forget_truth_ratio"):
        check_retain_log(log, read_sets(tofu, split, ours_only)["forget"], ours_only)


def test_all_400_denominators_of_forget10_are_those_of_our_tokens():
    """exact_memorization is hits / N and extraction_strength 1 - k / N, N = T - 1: with our N both are whole numbers, in every row."""
    chat = ChatFormat(llama3_tokenizer(), LLAMA3_ARGS, 512)
    rows = load_tofu(str(SHARED / "tofu")).perturbed("forget10")
    encoded = [chat.encode(row.question, row.answer, f"row {i}") for i, row in enumerate(rows)]
    for model in (FULL, "golden/tofu_Llama-3.2-1B-Instruct_retain90"):
        log = read_log(SHARED / model)
        for name in ("exact_memorization", "extraction_strength"):
            scores = log.metrics[name].column("score")
            assert len(scores) == len(encoded) == 400
            for row, score in zip(encoded, scores, strict=True):
                hits = score * (row.num_labels - 1)
                assert abs(hits - round(hits)) < 1e-4
    lengths = [row.num_prompt for row in encoded]
    assert (round(sum(lengths) / 400, 1), max(lengths)) == (58.4, 90)
    labels = [row.num_labels for row in encoded]
    assert (round(sum(labels) / 400, 1), max(labels)) == (36.7, 81)
