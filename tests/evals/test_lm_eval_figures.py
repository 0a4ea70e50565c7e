"""What becomes of the harness's results, worked by hand: no harness is needed."""

from fedunlearn.evals.lm_eval import _figures
from fedunlearn.evals.lm_eval_file import read_lm_eval, write_lm_eval
from fedunlearn.records.lm_eval import Figure, LmEvalLog

ROW = {"doc_id": 0, "doc_hash": "d", "prompt_hash": "p", "target_hash": "t"}


def found(**results):
    """The harness's results of tasks, each asked one row."""
    names = list(results)
    return {
        "results": {name: {"name": name, "alias": name, "sample_len": 1, **body} for name, body in results.items()},
        "group_subtasks": {},
        "n-shot": dict.fromkeys(names, 2),
        "versions": dict.fromkeys(names, "N/A"),
        "samples": {name: [ROW] for name in names},
    }


def test_what_is_no_finite_number_is_null_and_told(tmp_path, caplog):
    body = {"ppl,none": float("nan"), "ppl_stderr,none": float("inf"), "acc,none": 0.5, "acc_stderr,none": "N/A"}
    tasks = _figures(found(a={**body, "words,none": ["x"]}))
    assert tasks["a"].metrics == {"ppl": Figure(None, None), "acc": Figure(0.5, None), "words": Figure(None, None)}
    assert "ppl of a is nan, no finite number" in caplog.text
    assert "words of a" in caplog.text
    assert "acc of a" not in caplog.text
    log = LmEvalLog(tasks, {"limit": None})
    write_lm_eval(log, tmp_path)
    assert read_lm_eval(tmp_path) == log
    assert "NaN" not in (tmp_path / "LM_EVAL.json").read_text()


def test_a_filter_is_part_of_the_metrics_name():
    body = {"match,strict": 0.25, "match_stderr,strict": 0.1, "match,loose": 0.5, "match_stderr,loose": 0.2}
    metrics = _figures(found(a=body))["a"].metrics
    assert metrics == {"match,strict": Figure(0.25, 0.1), "match,loose": Figure(0.5, 0.2)}


def test_parts_stand_under_a_group_only_where_it_has_figures():
    """mmlu pools its parts; a group without metrics of its own leaves them to stand by themselves."""
    both = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    results = found(a=both, b=both)
    results["results"]["pooled"] = {"name": "pooled", "sample_len": 2, "sample_count": {"acc,none": 2}, **both}
    results["results"]["bag"] = {"name": "bag", "alias": "bag"}
    results["group_subtasks"] = {"pooled": ["a"], "bag": ["b"]}
    tasks = _figures(results)
    assert {name: task.part_of for name, task in tasks.items()} == {"a": "pooled", "b": None, "pooled": None}
    assert LmEvalLog(tasks, {}).main_figures == (("b", "acc"), ("pooled", "acc"))
    assert (tasks["pooled"].rows_hash, tasks["pooled"].num_rows) == (None, 2)


def test_the_hash_of_rows_changes_with_what_was_asked():
    one, other = found(a={"acc,none": 1}), found(a={"acc,none": 1})
    other["samples"]["a"] = [{**ROW, "prompt_hash": "q"}]
    hashes = [_figures(results)["a"].rows_hash for results in (one, one, other)]
    assert hashes[0] == hashes[1] != hashes[2]
