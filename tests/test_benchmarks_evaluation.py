"""The evaluation benchmark on a tiny model and a made-up TOFU: both ways do the same work, it is counted right, and missed bounds are told."""

import json
from collections import Counter
from dataclasses import replace

import evaluation
import evaluation_plain as plain
import pytest
from evaluation_data import VOCAB, Bounds, Folded, made_case
from helpers_eval import LLAMA3_ARGS, SHARED, byte_tokenizer, llama3_tokenizer, needs_shared, tiny_llama, write_folder

from fedunlearn.data.chat import ChatFormat, EncodedRow
from fedunlearn.data.tofu import load_tofu


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("tofu"))
    rows = [{"question": f"Who is not {i}?", "answer": f"Nobody, {i} ."} for i in range(4)]
    (folder / "holdout10.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    chat = ChatFormat(byte_tokenizer(), LLAMA3_ARGS, 512)
    made = made_case("tiny", tiny_llama().eval(), chat, load_tofu(str(folder)), 4, None, lambda x: x, lambda x: x)
    return replace(made, stop=tuple(range(0, 266, 10)))


def test_plain_answers_are_asked_for_as_often_as_by_the_metrics(case):
    """Forget answers 3 times and 10 with all attacks, holdout answers once and 7 times; any other answer once."""
    forget, *_, holdout = case.sets
    for attacks, of_forget, of_holdout in ((False, 3, 1), (True, 10, 7)):
        asked = Counter(row for _, rows, _ in plain.passes(case.sets, attacks) for row in rows)
        assert {asked[row] for row in forget.plain} == {of_forget}
        assert {asked[row] for row in holdout.plain} == {of_holdout}
        others = {row for data in case.sets for rows in data.rows for row in rows} - {*forget.plain, *holdout.plain}
        assert {asked[row] for row in others} == {1}


@needs_shared
def test_padded_positions_of_the_plain_way_are_the_known_ones():
    """921,399 for forget10 under Llama-3's tokenizer: 7,668 sequences in 253 batches and more."""
    chat = ChatFormat(llama3_tokenizer(), LLAMA3_ARGS, 512)
    whole = made_case("", None, chat, load_tofu(str(SHARED / "tofu")), 4, None, lambda x: x, lambda x: x).whole
    assert plain.padded_positions(whole) == 921_399
    assert sum(len(rows) for _, rows, _ in plain.passes(whole, False)) == 7_668


def test_both_ways_agree_and_all_figures_are_there(case):
    found = evaluation.measure(case, 1)
    assert found.apart < 1e-5
    assert found.same_texts == 1
    assert min(found.base, found.attacks, found.generation, *found.memory_mib) > 0
    assert found.positions[1] < found.positions[0]
    assert found.faults == ()
    assert "tiny" in evaluation.shown(found, case)


def test_missed_bounds_are_told(case):
    found = evaluation.Measured(
        case="", base=3.0, attacks=9.0, generation=1.0, gradnorm=1.0, positions=(100, 50), memory_mib=(10.0, 11.0),
        apart=1e-3, same_texts=1.0, seconds={},
    )  # fmt: skip
    held = replace(case, bounds=Bounds(base=3.5, attacks=5.5, generation=0.5, positions=2.5))
    told = evaluation.faults_of(found, held)
    assert [fault.split(":")[0] for fault in told] == [
        "scores lie 1.0e-03 apart, more than 0.0001", "base", "positions", "memory",
    ]  # fmt: skip
    assert len(evaluation.faults_of(found, case)) == 1


def test_folded_ids_keep_rows_and_beginnings_apart_and_together():
    fold = Folded()
    one, two = (fold.row(EncodedRow(ids, 2)) for ids in ((90_000, 5, 7), (90_000, 5, 8)))
    assert (one.input_ids, two.input_ids) == ((1, 2, 3), (1, 2, 4))
    with pytest.raises(AssertionError, match="more different ids"):
        fold.ids(tuple(range(10, VOCAB + 20)))
