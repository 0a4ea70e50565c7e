"""Many methods on one request: the recipe's words, what is run again and what is not, rows that cannot be, and the judgement by hand."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers_runs import CONFIGS, SMALL

from fedunlearn.doors import compare
from fedunlearn.doors.compare import run_comparison
from fedunlearn.doors.comparison import KEYS, Comparison, read_comparison
from fedunlearn.errors import UserError
from fedunlearn.records.comparison import Figures, MethodRun, Spread, Standard, Verdict, spread, verdict
from fedunlearn.reporting.comparison import cells, lines_of, told, write

THAN = Standard(oracle_prob=0.2, tuned_utility=0.8)
GOOD = {"prob": Spread(0.2, 0), "quality": Spread(0.5, 1), "utility": Spread(0.8, 0), "cost": Spread(0.1, 0)}


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({}, ()),
        ({"prob": Spread(0.0401, 0)}, ()),
        ({"prob": Spread(0.0399, 0)}, ("forget_prob",)),
        ({"prob": Spread(0.25, 0)}, ()),
        ({"prob": Spread(0.2501, 0)}, ("forget_prob",)),
        ({"quality": Spread(0.0099, 1)}, ("forget_quality",)),
        ({"utility": Spread(0.7199, 0)}, ("utility",)),
        ({"cost": Spread(0.2501, 0), "prob": Spread(0.5, 0)}, ("forget_prob", "cost")),
    ],
)
def test_the_four_bounds_by_hand(changed, fails):
    """Oracle 0.2: between 0.04 and 0.25; fine-tuned utility 0.8: at least 0.72."""
    assert verdict(**{**GOOD, **changed}, than=THAN) == Verdict(fails=fails)
    assert Verdict(fails=fails).good == (not fails)


@pytest.mark.parametrize(
    ("changed", "than", "said"),
    [
        ({"quality": None}, THAN, Verdict(unknown=("forget_quality",))),
        ({"utility": None, "prob": None}, THAN, Verdict(unknown=("forget_prob", "utility"))),
        ({"quality": None, "cost": Spread(0.3, 0)}, THAN, Verdict(fails=("cost",), unknown=("forget_quality",))),
        ({}, Standard(oracle_prob=None, tuned_utility=0.8), Verdict(unknown=("forget_prob",))),
        ({}, Standard(oracle_prob=0.2, tuned_utility=None), Verdict(unknown=("utility",))),
    ],
)
def test_a_bound_that_nothing_is_known_of_is_neither_met_nor_missed(changed, than, said):
    found = verdict(**{**GOOD, **changed}, than=than)
    assert found == said
    assert not found.good


def test_spread_is_mean_and_deviation_and_of_p_values_the_geometric_mean():
    assert spread([1.0, 3.0]) == Spread(2.0, 1.0)
    found = spread([1e-4, 1e-2], geometric=True)
    assert (found.mean, found.deviation) == (pytest.approx(1e-3), pytest.approx(10.0))
    assert spread([1.0, None]) is None
    assert spread([0.0], geometric=True).mean < 1e-200


def run_of(name, prob, seed=0, why="", request=1, quality=0.5):
    figures = Figures(
        forget_prob=prob,
        forget_quality=quality,
        truth_ratio=0.7,
        utility=0.8,
        rouge=0.4,
        tokens=0.1,
        steps=0.2,
        seconds=0.1,
        wall=3.0,
    )
    return MethodRun(
        name=name, protocol="InRound", settings="a=1", request=request, seed=seed, figures=None if why else figures, why=why
    )  # fmt: skip


def test_lines_count_who_meets_all_and_mark_overshoot_and_what_cannot_be(tmp_path):
    runs = [
        run_of("fine-tuned", 0.9), run_of("retrain", 0.2), run_of("npo", 0.1), run_of("npo", 0.15, seed=1), run_of("rmu", 0.5),
        run_of("rollback", 0.2), run_of("pdu", 0.0, why="client 9 owns forget rows only"),
    ]  # fmt: skip
    lines = lines_of(runs)
    assert [line.name for line in lines] == ["fine-tuned", "retrain", "npo", "rmu", "rollback", "pdu"]
    first, second = told(lines)
    assert first.startswith("1 of 3 meet all of")
    assert first.endswith(": npo")
    assert second == "forget Prob below the oracle's (overshoot, marked *): npo"
    by_name = {line.name: cells(line) for line in lines}
    assert by_name["npo"][2] == "0.125* ± 0.025"
    assert by_name["rmu"][-1] == "fails forget_prob"
    assert by_name["pdu"][-1] == "not applicable: client 9 owns forget rows only"
    write(runs, tmp_path)
    rows = list(csv.reader((tmp_path / "table.csv").open()))
    assert [row[1] for row in rows[1:]] == [line.name for line in lines]
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(runs)
    assert (tmp_path / "table.md").read_text().count("\n| 1 |") == len(lines)


def test_a_null_forget_quality_is_not_known_and_does_not_count_as_met():
    """A request outside the forget split has no forget quality, whatever the method."""
    runs = [
        run_of("fine-tuned", 0.9, quality=None),
        run_of("retrain", 0.2, quality=None),
        run_of("npo", 0.2, quality=None),
    ]
    lines = lines_of([*runs, run_of("rmu", 0.5, quality=None)])
    assert cells(lines[2])[-1] == "not known: forget_quality"
    assert cells(lines[3])[-1] == "fails forget_prob; not known: forget_quality"
    assert cells(lines[1])[-1] == ""
    assert told(lines)[0].startswith("0 of 2 meet all of")


def test_every_request_has_closing_sentences_of_its_own(tmp_path):
    """npo meets all in the first request, rmu in the second, and each is counted among two, not among four."""
    runs = [
        run_of(name, prob, request=request)
        for request, probs in ((1, (0.2, 0.5)), (2, (0.5, 0.2)))
        for name, prob in zip(("fine-tuned", "retrain", "npo", "rmu"), (0.9, 0.2, *probs), strict=True)
    ]
    write(runs, tmp_path)
    for name in ("table.md", "table.txt"):
        text = (tmp_path / name).read_text()
        said = [line for line in text.splitlines() if "meet all of" in line]
        assert [(line.split(" meet")[0], line.rpartition(": ")[2]) for line in said] == [
            ("1 of 2", "npo"),
            ("1 of 2", "rmu"),
        ]
        assert (
            text.index("1 of 2") < text.rindex("InRound") < text.rindex("1 of 2")
        )  # after its own table, not after all
    assert (tmp_path / "table.md").read_text().count("\n| 2 |") == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["methods=[npoo]"], "methods: 'npoo' is unknown; did you mean 'npo'? Known: grad_ascent, "),
        (["methods=[[npo]]"], "methods: '[npo]' is unknown; did you mean 'npo'?"),
        (["methods=npo"], "methods=npo is no list of methods: give one in brackets, as in methods=[npo,rmu], or leave it out for all"),
        (["methods=[]"], "methods=[] is no list of methods"),
        (["methods="], "methods=null is no list of methods"),
        (["methods=[npo,rmu,npo]"], "methods: 'npo' stands there twice: one row a method; leave one out"),
        (["seeds=[a]"], "seeds: 'a' is no seed: allowed are whole numbers from 0, as in seeds=[0,1,2]"),
        (["seeds=[-1]"], "seeds: '-1' is no seed: allowed are whole numbers from 0"),
        (["seeds=[true]"], "seeds: 'True' is no seed"),
        (["seeds=3"], "seeds=3 is no list of seeds: give one in brackets, as in seeds=[0,1,2]"),
        (["seeds=[0,1,0]"], "seeds: 0 stands there twice, and would count twice in every mean: leave one out"),
        (["requests={authors: [18]}"], "requests={authors:[18]} is no list of requests: give one in brackets, as in requests=[{authors: [18]}]"),
        (["requests=[18]"], "requests[0]=18 is no request: name rows, authors or a client, as in {authors: [18]}"),
        (["requests=[{authors: [18]}"], "'requests=[{authors: [18]}' cannot be read: give a value, or a list in brackets"),
        (["request=everyone"], "request='everyone' is unknown: known are sample, client"),
        (["experiment=unlearn/tofu/pockt"], "has no recipe for comparing; did you mean 'unlearn/tofu/pocket'?"),
        (["experiment=nonsense/pocket"], "experiment='nonsense/pocket' has no recipe for comparing"),
        (["experiment=pocket"], "has no recipe for comparing. Known: unlearn/tofu/default, unlearn/tofu/pocket"),
        (["experiment=unlearn/tofu/../pocket"], "has no recipe for comparing"),
        (["sedes=[0]"], "'sedes=[0]' is no setting of a comparison; did you mean 'seeds'?"),
        (["seeds"], "'seeds' is no setting of a comparison"),
        (["seeds=[0]", "seeds=[1]"], "seeds is given twice: leave one of them out"),
    ],
)  # fmt: skip
def test_a_word_that_means_nothing_is_refused_by_name_in_one_message(words, said):
    with pytest.raises(UserError) as fault:
        read_comparison(words, CONFIGS)
    (message,) = fault.value.faults
    assert said in message


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(UserError) as fault:
        read_comparison(["methods=npo", "seeds=[a,b]", "request=x"], CONFIGS)
    assert [message.split("=")[0].split(":")[0] for message in fault.value.faults] == [
        "methods",
        "seeds",
        "seeds",
        "request",
    ]


def test_what_is_sound_arrives():
    words = ["methods=[rmu,npo]", "seeds=[2,0]", "requests=[{authors: [18]}, {client: 3, target: gone}]", "saves_dir=x"]
    chosen = read_comparison(words, CONFIGS)
    assert (chosen.methods, chosen.seeds, chosen.saves.name) == (("rmu", "npo"), (2, 0), "x")
    assert chosen.requests == ("{authors:[18]}", "{client:3,target:gone}")
    assert read_comparison([], CONFIGS).requests == (None,)
    assert read_comparison(["request=client"], CONFIGS).requests == ("{client:9}",)


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_tells_every_key_and_runs_nothing(word, tmp_path):
    script = CONFIGS.parent / "scripts" / "compare_methods.py"
    done = subprocess.run([sys.executable, script, word], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, list(tmp_path.iterdir())) == (0, "", [])
    assert all(f"\n  {key}= " in done.stdout for key in KEYS)


def test_every_recipe_names_methods_that_there_are():
    for path in sorted((CONFIGS / "compare").glob("*.yaml")):
        chosen = read_comparison([f"experiment=unlearn/tofu/{path.stem}"], CONFIGS)
        named = {str((chosen.recipe["methods"][name] or {}).get("method", name)) for name in chosen.methods}
        assert named <= {file.stem for file in (CONFIGS / "method").glob("*.yaml")}
    pocket = read_comparison([], CONFIGS)
    apart = {"dpo"}  # wants answers of the user's own
    assert set(pocket.methods) | apart == {file.stem for file in (CONFIGS / "method").glob("*.yaml")}


@pytest.fixture
def small(pocket, saves):
    """The pocket's recipe on the tests' small one."""
    recipe = read_comparison([], CONFIGS).recipe
    places = [f"tofu_path={pocket.data}", *SMALL]
    base = [f"model.model_args.pretrained_model_name_or_path={pocket.model}"]
    on = ["eval.at_end=true", "eval.max_new_tokens=4"]
    recipe = {
        **recipe,
        "finetune": [*recipe["finetune"], *places, *base],
        "oracle": [*recipe["oracle"], *places, *base, *on],
        "unlearn": [*recipe["unlearn"], *places, *on],
        "replay": [*recipe["replay"], *places, *on],
        "evaluate": [*recipe["evaluate"], places[0], "eval.max_new_tokens=4", "model.model_args.lora_config.r=4"],
        "methods": {"npo": {}, "negation": {}, "rollback": {"recipe": "replay"}},
    }
    return Comparison(
        recipe=recipe, methods=("npo", "negation", "rollback"), seeds=(0,), request="sample", requests=(None,), task_name="c",
        configs=CONFIGS, saves=saves, pocket_dir=saves / "pocket",
    )  # fmt: skip


@pytest.fixture
def ran(monkeypatch):
    """The runs and evaluations that were really made, by name, in order."""
    names = []

    def noting(real):
        def noted(composed):
            names.append(composed.run.task_name)
            return real(composed)

        return noted

    for name in ("run_federated", "run_evaluation"):
        monkeypatch.setattr(compare, name, noting(getattr(compare, name)))
    return names


def test_it_goes_on_where_it_was_stopped_and_repeats_nothing(small, saves, ran):
    first = list(run_comparison(small))
    assert [run.name for run in first] == ["fine-tuned", "retrain", "npo", "negation", "rollback"]
    assert [run.protocol for run in first[2:]] == ["InRound", "its own", "its own"]
    assert first[1].figures.tokens == 1.0
    assert all(run.figures.tokens > 0 for run in first[2:4])
    assert ran == [
        "c_s0_fine-tuned",
        "c_s0_retrain1",
        "c_s0_fine-tuned1",
        "c_s0_npo1",
        "c_s0_negation1",
        "c_s0_rollback1",
    ]
    ran.clear()
    assert list(run_comparison(small)) == first
    assert ran == []
    shutil.rmtree(saves / "unlearn" / "c_s0_negation1")
    again = list(run_comparison(small))
    assert ran == ["c_s0_negation1"]
    assert [run.figures.forget_prob for run in again] == [run.figures.forget_prob for run in first]


def test_a_row_made_from_an_earlier_fine_tuning_is_made_anew(small, saves, ran):
    """The recipe's fine-tuning changes, and only npo is asked for; when negation is asked for again its old row has its config still."""
    both, one = replace(small, methods=("npo", "negation")), replace(small, methods=("npo",))
    before = list(run_comparison(both))
    recipe = {**small.recipe, "finetune": [*small.recipe["finetune"], "trainer.args.learning_rate=1e-3"]}
    ran.clear()
    list(run_comparison(replace(one, recipe=recipe)))
    assert ran == ["c_s0_fine-tuned", "c_s0_fine-tuned1", "c_s0_npo1"]  # the oracle was never made from it
    ran.clear()
    after = list(run_comparison(replace(both, recipe=recipe)))
    assert ran == ["c_s0_negation1"]
    assert after[-1].figures.forget_prob != before[-1].figures.forget_prob
    told = json.loads((saves / "unlearn" / "c_s0_negation1" / "provenance.json").read_text())["hashes"]
    tuned = json.loads((saves / "finetune" / "c_s0_fine-tuned" / "done.json").read_text())
    assert told["source"] == told["start_adapter"] == tuned["adapter_hash"]


def test_what_was_held_against_another_log_of_the_oracle_is_made_anew(small, saves, ran):
    one = replace(small, methods=("npo",))
    list(run_comparison(one))
    log = saves / "finetune" / "c_s0_retrain1" / "TOFU_EVAL.json"
    log.write_bytes(log.read_bytes() + b"\n")
    ran.clear()
    list(run_comparison(one))
    assert ran == ["c_s0_fine-tuned1", "c_s0_npo1"]


def test_a_request_that_no_config_takes_is_refused_before_anything_runs(small, saves, ran):
    chosen = replace(small, requests=("{author:[18]}",))
    with pytest.raises(UserError, match=r"requests\[0\].author=\[18\] is an unknown key; did you mean 'authors'"):
        list(run_comparison(chosen))
    assert ran == []
    assert not saves.exists()


def test_a_method_that_ownership_forbids_is_a_row_with_its_reason_and_the_others_go_on(small, saves):
    asked = {"federation": ["partition=by_author", "trainer.federated.num_clients=10"], "requests": [{"client": 9}]}
    recipe = {**small.recipe, "requests": {"client": asked}}
    chosen = Comparison(
        recipe=recipe, methods=("npo", "negation"), seeds=(0,), request="client", requests=("{client:9}",), task_name="c",
        configs=CONFIGS, saves=saves, pocket_dir=saves / "pocket",
    )  # fmt: skip
    runs = {run.name: run for run in run_comparison(chosen)}
    assert runs["npo"].figures is None
    assert "client 9 of 10 owns forget rows only" in runs["npo"].why
    assert runs["negation"].figures is not None
    assert runs["retrain"].figures.forget_prob == pytest.approx(runs["retrain"].figures.forget_prob)


def test_a_method_that_wants_owners_who_are_gone_is_a_row_with_its_reason(small):
    """Only negation can serve a request whose owners are gone; the local method and FedOSD say why not."""
    asked = {"negation": {}, "npo": {}, "fedosd": {}}
    chosen = replace(
        small,
        methods=tuple(asked),
        requests=("{authors:[18],target:gone}",),
        recipe={**small.recipe, "methods": asked},
    )
    runs = {run.name: run for run in run_comparison(chosen)}
    assert "target=gone beside method NPO: with its owners gone nobody can unlearn their rows" in runs["npo"].why
    assert "target=gone beside method FedOSD, for which the owners must unlearn" in runs["fedosd"].why
    assert runs["negation"].figures is not None


def test_a_second_request_after_a_method_that_leaves_a_stack_is_not_made_twice(small, ran):
    """Negation exports its subtraction beside the factors: what the second run begins with is no longer the adapter as it lies in the folder."""
    requests = tuple(f"{{authors:[{author}]}}" for author in (18, 19))
    chosen = replace(small, methods=("negation",), requests=requests)
    first = list(run_comparison(chosen))
    assert ran[-2:] == ["c_s0_negation1", "c_s0_negation2"]
    ran.clear()
    assert list(run_comparison(chosen)) == first
    assert ran == []


def test_requests_in_sequence_have_an_oracle_each_and_go_on_from_one_another(small, saves):
    requests = tuple(f"{{authors:[{author}]}}" for author in (18, 19))
    chosen = Comparison(
        recipe=small.recipe, methods=("npo",), seeds=(0,), request="sample", requests=requests, task_name="c",
        configs=CONFIGS, saves=saves, pocket_dir=saves / "pocket",
    )  # fmt: skip
    runs = [(run.name, run.request) for run in run_comparison(chosen)]
    assert runs == [("fine-tuned", 1), ("retrain", 1), ("fine-tuned", 2), ("retrain", 2), ("npo", 1), ("npo", 2)]
    second = json.loads((saves / "unlearn" / "c_s0_npo2" / "request.json").read_text())
    oracle = json.loads((saves / "finetune" / "c_s0_retrain2" / "request.json").read_text())
    assert second["before"] == [72, 73, 74, 75]
    assert sorted([*second["rows"], *second["before"]]) == oracle["rows"]
