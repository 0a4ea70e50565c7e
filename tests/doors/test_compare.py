"""Many methods on one request: the recipe's words, what is run again and what is not, rows that cannot be, and the judgement by hand."""

import csv
import json
import shutil

import pytest
from helpers_runs import CONFIGS, SMALL

from fedunlearn.doors import compare
from fedunlearn.doors.compare import Comparison, read_comparison, run_comparison
from fedunlearn.errors import UserError
from fedunlearn.records.comparison import Figures, MethodRun, Spread, Standard, spread, verdict
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
        ({"quality": None}, ("forget_quality",)),
        ({"utility": Spread(0.7199, 0)}, ("utility",)),
        ({"cost": Spread(0.2501, 0), "prob": None}, ("forget_prob", "cost")),
    ],
)
def test_the_four_bounds_by_hand(changed, fails):
    """Oracle 0.2: between 0.04 and 0.25; fine-tuned utility 0.8: at least 0.72."""
    assert verdict(**{**GOOD, **changed}, than=THAN) == fails


def test_spread_is_mean_and_deviation_and_of_p_values_the_geometric_mean():
    assert spread([1.0, 3.0]) == Spread(2.0, 1.0)
    found = spread([1e-4, 1e-2], geometric=True)
    assert (found.mean, found.deviation) == (pytest.approx(1e-3), pytest.approx(10.0))
    assert spread([1.0, None]) is None
    assert spread([0.0], geometric=True).mean < 1e-200


def run_of(name, prob, seed=0, why=""):
    figures = Figures(
        forget_prob=prob,
        forget_quality=0.5,
        truth_ratio=0.7,
        utility=0.8,
        rouge=0.4,
        tokens=0.1,
        steps=0.2,
        seconds=0.1,
        wall=3.0,
    )
    return MethodRun(
        name=name, protocol="InRound", settings="a=1", request=1, seed=seed, figures=None if why else figures, why=why
    )


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["methods=[npoo]"], "methods: 'npoo' is unknown; did you mean 'npo'?"),
        (["request=everyone"], "request='everyone' is unknown: known are sample, client"),
        (["experiment=unlearn/tofu/pockt"], "has no recipe for comparing"),
        (["sedes=[0]"], "'sedes=[0]' is no setting of a comparison; did you mean 'seeds'?"),
        (["seeds"], "'seeds' is no setting of a comparison"),
    ],
)
def test_a_word_that_means_nothing_is_refused_by_name(words, said):
    with pytest.raises(UserError) as fault:
        read_comparison(words, CONFIGS)
    assert said in str(fault.value)


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


def test_it_goes_on_where_it_was_stopped_and_repeats_nothing(small, saves, monkeypatch):
    first = list(run_comparison(small))
    assert [run.name for run in first] == ["fine-tuned", "retrain", "npo", "negation", "rollback"]
    assert [run.protocol for run in first[2:]] == ["InRound", "its own", "its own"]
    assert first[1].figures.tokens == 1.0
    assert all(run.figures.tokens > 0 for run in first[2:4])
    ran, real = [], compare.run_federated

    def counting(composed):
        ran.append(composed.run.task_name)
        return real(composed)

    monkeypatch.setattr(compare, "run_federated", counting)
    assert list(run_comparison(small)) == first
    assert ran == []
    shutil.rmtree(saves / "unlearn" / "c_s0_negation1")
    again = list(run_comparison(small))
    assert ran == ["c_s0_negation1"]
    assert [run.figures.forget_prob for run in again] == [run.figures.forget_prob for run in first]


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
