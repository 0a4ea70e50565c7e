"""Requests as rows, authors, a client, and several together; those that cannot be served; what an evaluation makes of one outside the forget split."""

import json

import pytest
from helpers_requests import ROWS, author, client_rows, serve, watch
from helpers_runs import CONFIGS, central, finetune, history

from fedunlearn.data.tofu import load_tofu
from fedunlearn.doors.compose import compose
from fedunlearn.doors.evaluation import run_evaluation
from fedunlearn.errors import UserError

ALONE = ("method.retain=none", "method.alpha=0")


@pytest.fixture(scope="module")
def made(pocket, tmp_path_factory):
    """A fine-tuning run."""
    return finetune(pocket, tmp_path_factory.mktemp("runs"))


ASKED = {
    "rows": ("{rows: [3, 41, 77]}", {3, 41, 77}),
    "authors": ("{authors: [2, 19]}", author(2, 19)),
    "client": ("{client: 1}", client_rows(1)),
    "together": ("{rows: [0], authors: [5], client: 2}", {0} | author(5) | client_rows(2)),
    "twice": ("{rows: [20, 20, 21], authors: [5, 5]}", author(5)),
    "author's order": ("{rows: [77, 3]}", {3, 77}),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_request_s_rows_are_forgotten_by_their_owners_and_by_nobody_else(pocket, saves, made, monkeypatch, name):
    seen, (request, rows) = watch(monkeypatch), ASKED[name]
    run = serve(pocket, saves, made, "un", f"requests=[{request}]", *ALONE)
    assert json.loads((run / "request.json").read_text()) == {"rows": sorted(rows), "before": [], "gone": []}
    for client in range(4):
        mine = rows & client_rows(client)
        assert seen.of("un", client, "unlearn") == mine
        assert seen.of("un", client, "finetune") == (set() if mine else client_rows(client))


def test_null_is_the_forget_split(pocket, saves, made):
    run = serve(pocket, saves, made, "un")
    assert json.loads((run / "request.json").read_text())["rows"] == sorted(author(18, 19))
    assert run == saves / "unlearn" / "un"


ROLLBACK = ("experiment=replay/tofu/pocket", "method=rollback")
REFUSED = {
    "a row that is not there": (("requests=[{rows: [0, 80]}]",), r"requests\[0\].rows: 80 is none of the 80 rows of full: allowed are 0 to 79"),
    "a negative row": (("requests=[{rows: [-1]}]",), r"requests\[0\].rows: -1 is none of the 80 rows"),
    "an author that is not there": (("requests=[{authors: [20]}]",), r"requests\[0\].authors: 20 is none of the 20 authors: allowed are 0 to 19"),
    "a client that is not there": (("requests=[{client: 4}]",), r"requests\[0\].client: 4 is none of the 4 clients: allowed are 0 to 3"),
    "the second of two": (("requests=[{client: 1}, {client: 9}]", *ALONE), r"requests\[\d\].client: 9 is none of the 4 clients"),
    "an empty one": (("requests=[{}]",), r"one of them is empty .*: name rows of full, authors or a client"),
    "one of no rows": (("requests=[{rows: []}]",), r"one of them is empty \(rows=\[\]"),
    "none": (("requests=[]",), r"requests=\[\] asks for nothing: name at least one, or null"),
    "all clients": (("requests=[{authors: [" + ",".join(map(str, range(20))) + "]}]", *ALONE), r"every row of every client would be forgotten"),
    "all clients one after the other": (("requests=[{client: 0},{client: 1},{client: 2},{client: 3}]", *ALONE), r"every row of every client would be forgotten"),
    "a client without a row to keep beside a retain term": (("requests=[{client: 3}]",), r"client 3 of 4 owns forget rows only \(20 of the request\), but method NPO has retain='nll'"),
    "gone beside a local method": (("requests=[{client: 3, target: gone}]", *ALONE), r"target=gone beside method NPO: with its owners gone nobody can unlearn"),
    "gone beside a method for which owners work": (("requests=[{client: 3, target: gone}]", "method=fedosd"), r"target=gone beside method FedOSD, for which the owners must unlearn or ascend themselves"),
    "gone beside MSA, whose owners tune": (("requests=[{client: 3, target: gone}]", "method=msa"), r"target=gone beside method MSA"),
    "CE-U past every label": (("method=ceu", "method.skip=1000"), r"method CEU leaves out each row's first 1000 labels \(method.skip\), and no row of the request has more than \d+"),
    "FedEraser's interval above the rounds": (("method=federaser", "method.interval=50"), r"method.interval=50 of FedEraser is above trainer.federated.num_rounds=\d+"),
    "an oracle's log beside several": (("requests=[{authors: [18]},{authors: [19]}]", "retain_logs_path=x"), r"retain_logs_path='x' beside several requests: each has an oracle of its own"),
    "an unknown key": (("requests=[{author: [19]}]",), r"author"),
    "another target": (("requests=[{client: 3, target: away}]",), r"target"),
    "words": (("requests=[{rows: [a]}]",), r"rows"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    REFUSED,
)
def test_what_cannot_be_served_is_refused_before_anything_is_written(pocket, saves, name):
    tuned = finetune(pocket, saves, "ft", "ledger.enabled=true")
    overrides, said = REFUSED[name]
    with pytest.raises(UserError, match=said):
        serve(pocket, saves, tuned, "un", *overrides)
    assert not (saves / "unlearn").exists()


def test_the_only_client_cannot_be_forgotten(pocket, saves):
    one = ("trainer.federated.num_clients=1",)
    tuned = finetune(pocket, saves, "ft", *one)
    with pytest.raises(
        UserError, match=r"every row of every client would be forgotten, and nothing is left to keep the model by"
    ):
        serve(pocket, saves, tuned, "un", *one, *ALONE, "requests=[{client: 0}]")


def test_requests_beside_fine_tuning_on_all_rows_are_refused(pocket, saves):
    with pytest.raises(UserError, match=r"requests are given, but fine-tuning on data.rows='full' leaves nothing out"):
        finetune(pocket, saves, "ft", "requests=[{client: 1}]")
    assert not (saves / "finetune").exists()


def test_the_central_baseline_serves_one_request_and_says_where_several_are(pocket, saves, made):
    """Merged into one they would be another run than the federation's, which forgets one after the other."""
    named = f"model.model_args.pretrained_model_name_or_path={made}"
    with pytest.raises(UserError) as caught:
        central(pocket, saves, "unlearn", "two", named, "requests=[{authors: [18]}, {authors: [19]}]")
    (said,) = caught.value.faults
    assert said.startswith("requests has 2 entries")
    assert "src/fed_train.py serves them so" in said
    assert "requests=[{authors: [18, 19]}]" in said
    assert not saves.exists()
    run = central(pocket, saves, "unlearn", "one", named, "requests=[{authors: [18, 19]}]")
    assert json.loads((run / "request.json").read_text())["rows"] == sorted(author(18, 19))


def test_all_that_only_a_federation_can_do_is_told_at_once(pocket, saves):
    several = ("requests=[{authors: [18]}, {authors: [19]}]", "ledger.enabled=true", "resume=true")
    with pytest.raises(UserError) as caught:
        central(pocket, saves, "unlearn", "two", *several)
    assert [said.split(" ")[0] for said in caught.value.faults] == ["resume=true:", "method", "requests"]


def test_the_central_oracle_leaves_out_all_that_its_requests_name(pocket, saves):
    """Nothing is served there: an oracle of two requests knows neither."""
    run = central(pocket, saves, "retrain", "oracle", "requests=[{authors: [18]}, {authors: [19]}]")
    assert json.loads((run / "request.json").read_text())["rows"] == sorted(author(18, 19))


CENTRAL_REFUSES = {
    "owners_only": (("protocol=owners_only",), r"protocol OwnersOnly: the central baseline has nobody to share roles with"),
    "all_clients": (("protocol=all_clients", "protocol.released=true"), r"protocol AllClients: the central baseline"),
    "every round": (("eval.every_n_rounds=1",), r"eval.every_n_rounds and eval.clients_every_n_rounds: the central baseline is one round"),
    "joins": (("partition.joins={3: 2}",), r"partition.joins: the central baseline has one round and no clients"),
}  # fmt: skip


@pytest.mark.parametrize("name", CENTRAL_REFUSES)
def test_the_central_baseline_refuses_what_only_a_federation_can_do(pocket, saves, name):
    tuned = finetune(pocket, saves, "ft")
    overrides, said = CENTRAL_REFUSES[name]
    with pytest.raises(UserError, match=said):
        central(pocket, saves, "unlearn", "un", f"model.model_args.pretrained_model_name_or_path={tuned}", *overrides)
    assert not (saves / "unlearn").exists()


def test_every_fault_of_a_request_is_told_at_once(pocket, saves, made):
    with pytest.raises(UserError) as caught:
        serve(pocket, saves, made, "un", "requests=[{rows: [99], authors: [44], client: 7}]")
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        "requests[0].rows",
        "requests[0].authors",
        "requests[0].client",
    ]


def test_the_oracle_leaves_out_all_that_its_requests_name(pocket, saves, monkeypatch):
    seen = watch(monkeypatch)
    finetune(pocket, saves, "oracle", "data=retain", "requests=[{authors: [3]}, {rows: [0]}, {client: 2}]")
    assert seen.of("oracle") == set(range(ROWS)) - author(3) - {0} - client_rows(2)


def test_an_author_forgotten_by_rows_is_the_author_forgotten(pocket, saves, made):
    """Another way to say it is no other run."""
    hashes = {
        history(serve(pocket, saves, made, name, f"requests=[{request}]"))[-1]["adapter_hash"]
        for name, request in (
            ("a", "{authors: [19]}"),
            ("b", "{rows: [79, 76, 78, 77]}"),
            ("c", "{rows: [76, 77], authors: [19]}"),
        )
    }
    assert len(hashes) == 1


# --- evaluation

NEED_WRONG_ANSWERS = ("forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "forget_truth_ratio", "forget_quality")
EVAL = ("eval.at_end=true", "eval.max_new_tokens=1")


def log_of(run):
    return json.loads((run / "TOFU_EVAL.json").read_text())


def asked(log, name):
    return [row["input"] for row in log[f"{name}_Q_A_ROUGE"]["value_by_index"].values()]


def test_a_request_outside_the_forget_split_has_prob_and_no_truth_ratio_and_says_why(pocket, saves, made):
    log = log_of(serve(pocket, saves, made, "un", "requests=[{authors: [2, 19]}]", *EVAL))
    full = load_tofu(str(pocket.data)).rows("full")
    assert len(asked(log, "forget")) == 8
    assert all(
        full[row].question in text for row, text in zip(sorted(author(2, 19)), asked(log, "forget"), strict=True)
    )
    assert 0 < log["forget_Q_A_Prob"]["agg_value"] < 1
    assert len(log["forget_Q_A_Prob"]["value_by_index"]) == 8
    assert all(log[name]["agg_value"] is None for name in NEED_WRONG_ANSWERS)
    assert log["model_utility"]["agg_value"] is not None
    why = "4 of 8 rows (first: row 8 of full) have no wrong or paraphrased answers in forget10_perturbed"
    assert log["provenance"]["null_because"] == {"forget": why}
    assert log["provenance"]["forget_split"] == "request"


def test_a_request_within_the_split_has_them_all_and_its_rows_numbers_are_the_split_s(pocket, saves, made):
    part, split = (
        log_of(serve(pocket, saves, made, name, *EVAL, *wanted, "trainer.args.learning_rate=0"))
        for name, wanted in (("part", ["requests=[{authors: [19]}]"]), ("split", []))
    )
    assert "null_because" not in part["provenance"]
    assert all(part[name]["agg_value"] is not None for name in NEED_WRONG_ANSWERS if name != "forget_quality")
    mine, theirs = (log["forget_truth_ratio"]["value_by_index"] for log in (part, split))
    assert split["provenance"]["forget_split"] == "forget10"
    if (
        history(saves / "unlearn" / "part")[-1]["adapter_hash"]
        == history(saves / "unlearn" / "split")[-1]["adapter_hash"]
    ):
        assert [mine[str(i)]["score"] for i in range(4)] == pytest.approx(
            [theirs[str(i + 4)]["score"] for i in range(4)], rel=1e-5
        )


def retain_rows(pocket):
    """Rows of `full` that stand in retain_perturbed."""
    tofu = load_tofu(str(pocket.data))
    full = [(row.question, row.answer) for row in tofu.rows("full")]
    return [full.index((row.question, row.answer)) for row in tofu.perturbed("retain")]


def test_requested_rows_are_out_of_the_retain_set_those_of_earlier_requests_too(pocket, saves, made):
    there = retain_rows(pocket)
    first, second = there[:3], there[4:5]
    left = [row for row in there if row not in (*first, *second)]
    assert 0 < len(left) < len(there) - 3
    serve(pocket, saves, made, "un", f"requests=[{{rows: {first}}}, {{rows: {second}}}]", *EVAL)
    full = load_tofu(str(pocket.data)).rows("full")
    for number, kept in ((1, [row for row in there if row not in first]), (2, left)):
        said = asked(log_of(saves / "unlearn" / f"un.{number}"), "retain")
        assert len(said) == len(kept)
        assert all(full[row].question in text for row, text in zip(kept, said, strict=True))


def test_a_request_that_leaves_no_retain_row_to_evaluate_gives_null_with_a_reason_or_is_refused(pocket, saves, made):
    try:
        run = serve(pocket, saves, made, "un", f"requests=[{{rows: {retain_rows(pocket)}}}]", *EVAL)
    except UserError:
        return
    log = log_of(run)
    assert log["retain_Q_A_Prob"]["agg_value"] is None
    assert "retain" in log["provenance"]["null_because"]


def evaluate(pocket, saves, task, start, *overrides):
    places = (
        f"tofu_path={pocket.data}", f"model.model_args.pretrained_model_name_or_path={start}", f"paths.saves_dir={saves}",
        f"paths.cache_dir={saves}/cache", f"paths.pocket_dir={saves}/pocket", f"task_name={task}", "eval.max_new_tokens=1",
        "model.model_args.lora_config.r=null", "model.model_args.lora_config.lora_alpha=null",
    )  # fmt: skip
    return run_evaluation(compose(CONFIGS, "eval.yaml", ["experiment=eval/tofu/pocket", *places, *overrides]))


def test_the_evaluation_door_takes_the_same_requests_and_gives_the_same_numbers(pocket, saves, made):
    run = serve(pocket, saves, made, "un", "requests=[{authors: [2, 19]}]", *EVAL)
    evaluate(pocket, saves, "ev", run, "requests=[{authors: [2, 19]}]")
    at_end, later = log_of(run), log_of(saves / "eval" / "ev")
    assert later["forget_truth_ratio"]["agg_value"] is at_end["forget_truth_ratio"]["agg_value"] is None
    for name in ("forget_Q_A_Prob", "retain_Q_A_Prob", "model_utility"):
        assert later[name]["agg_value"] == pytest.approx(at_end[name]["agg_value"], rel=1e-4)
    assert later["provenance"]["null_because"] == at_end["provenance"]["null_because"]
    with pytest.raises(UserError, match=r"requests\[0\].client=1: what is evaluated is no run of ours"):
        evaluate(pocket, saves, "ev2", pocket.model, "requests=[{client: 1}]")


def test_evaluating_another_set_than_was_forgotten_is_said(pocket, saves, made, caplog):
    run = serve(pocket, saves, made, "un", "requests=[{authors: [2]}]")
    caplog.clear()
    evaluate(pocket, saves, "ev", run)
    assert (
        "forgot other rows than forget_split=forget10, which is evaluated: give requests= as that run had it"
        in caplog.text
    )


def test_an_oracle_s_log_serves_the_same_request_and_no_other(pocket, saves, made):
    for name, authors in (("same", 19), ("other", 18)):
        finetune(pocket, saves, name, "data=retain", f"requests=[{{authors: [{authors}]}}]", *EVAL)
    logs = {name: saves / "finetune" / name / "TOFU_EVAL.json" for name in ("same", "other")}
    run = serve(pocket, saves, made, "un", "requests=[{authors: [19]}]", *EVAL, f"retain_logs_path={logs['same']}")
    assert 0 <= log_of(run)["forget_quality"]["agg_value"] <= 1
    with pytest.raises(UserError, match=r"retain_logs_path: the log was made on other rows of request than these"):
        serve(pocket, saves, made, "x", "requests=[{authors: [19]}]", *EVAL, f"retain_logs_path={logs['other']}")
    assert not (saves / "unlearn" / "x").exists()
