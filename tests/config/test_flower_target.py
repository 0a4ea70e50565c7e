"""`strategy._target_` names a Flower strategy: what is taken, and how each fault is told."""

from pathlib import Path

import flwr.serverapp.strategy
import pytest

from fedunlearn.aggregation.fedprox import FedProx
from fedunlearn.aggregation.flower import FlowerStrategy, constructor_parameters
from fedunlearn.config.parse import parse_config
from fedunlearn.doors.compose import compose
from fedunlearn.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
STOCK = "flwr.serverapp.strategy."
OURS = "helpers_strategies."
LOADED = {"FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedMedian", "FedProx", "FedTrimmedAvg", "FedYogi", "Krum"}
LOADED |= {"MultiKrum", "Bulyan", "FedXgbBagging", "FedXgbCyclic"}
WRAPPERS = [
    f"DifferentialPrivacy{side}Side{kind}Clipping" for side in ("Client", "Server") for kind in ("Adaptive", "Fixed")
]


def strategy_of(*overrides):
    return compose(CONFIGS, "train-lora.yaml", ["task_name=t", *overrides]).run.strategy


@pytest.fixture(scope="module")
def plain():
    """A composed fine-tuning run, to put strategies into."""
    return compose(CONFIGS, "train-lora.yaml", ["task_name=t"]).plain


def faults(plain, target, **parameters):
    with pytest.raises(UserError, match=r"strategy") as caught:
        parse_config({**plain, "strategy": {"_target_": target, **parameters}})
    return list(caught.value.faults)


@pytest.mark.parametrize("plus", ["", "+"])
def test_krum_of_the_command_line_arrives(plus):
    run = strategy_of("strategy._target_=flwr.serverapp.strategy.Krum", f"{plus}strategy.num_malicious_nodes=1")
    assert run == FlowerStrategy(target=STOCK + "Krum", parameters={"num_malicious_nodes": 1})
    assert run.client_mu == 0.0


def test_ours_still_arrive_as_themselves():
    assert strategy_of("strategy=fedprox", "strategy.mu=0.5") == FedProx(mu=0.5)


@pytest.mark.parametrize("name", sorted(set(flwr.serverapp.strategy.__all__) - {"Result"}))
def test_each_stock_strategy_is_taken_or_refused_with_its_reason(plain, name):
    if name in LOADED:
        taken = parse_config({**plain, "strategy": {"_target_": STOCK + name}}).strategy
        assert taken == FlowerStrategy(target=STOCK + name)
        return
    (told,) = faults(plain, STOCK + name)
    reason = {
        "QFedAvg": "strategy.client_learning_rate is missing and has no default: give strategy.client_learning_rate=VALUE",
        "Strategy": "is abstract: name a class that has aggregate_evaluate, aggregate_train, configure_evaluate",
        **dict.fromkeys(WRAPPERS, "wraps another strategy (its parameter 'strategy')"),
    }[name]
    assert reason in told


def test_what_is_missing_is_taken_once_it_is_given(plain):
    given = {"_target_": STOCK + "QFedAvg", "client_learning_rate": 1e-3}
    assert parse_config({**plain, "strategy": given}).strategy.parameters == {"client_learning_rate": 1e-3}


@pytest.mark.parametrize(
    ("target", "parameters", "said"),
    [
        (STOCK + "Krum", {"num_malicious": 1}, "strategy.num_malicious=1 is an unknown key; did you mean 'num_malicious_nodes'? Known: num_malicious_nodes. Correct it"),
        (STOCK + "FedMedian", {"beta": 1}, "strategy.beta=1 is an unknown key. This class has no parameters to set"),
        (STOCK + "FedAvgM", {"server_momentum": "much"}, "strategy.server_momentum='much' does not fit; allowed: a finite number"),
        (STOCK + "FedAvgM", {"server_momentum": float("inf")}, "strategy.server_momentum=inf does not fit; allowed: a finite number"),
        (STOCK + "FedAvgM", {"server_momentum": {"of": 1}}, "strategy.server_momentum={'of': 1} does not fit; allowed: a finite number, text, true"),
        (STOCK + "FedAdam", {"eta": "???"}, "strategy.eta is missing and has no default"),
        (STOCK + "QFedAvg", {"client_learning_rate": "???"}, "strategy.client_learning_rate is missing and has no default"),
        (STOCK + "Bulyan", {"selection_rule": "krum"}, "strategy.selection_rule='krum' is refused: it takes a function"),
        (STOCK + "Krum", {"fraction_train": 0.5}, "strategy.fraction_train=0.5 is refused: trainer.federated.fraction_train draws"),
        (STOCK + "FedXgbCyclic", {"min_train_nodes": 2}, "strategy.min_train_nodes=2 is refused: trainer.federated.min_clients says"),
        (STOCK + "Krum", {"min_available_nodes": 2}, "is refused: trainer.federated.min_clients says"),
        (STOCK + "Krum", {"fraction_evaluate": 0.0}, "is refused: eval.* says what is evaluated"),
        (STOCK + "Krum", {"min_evaluate_nodes": 1}, "is refused: eval.* says what is evaluated"),
        (STOCK + "Krum", {"weighted_by_key": "n"}, "is refused: it is fixed by us at 'num-examples'"),
        (STOCK + "Krum", {"arrayrecord_key": "n"}, "is refused: it is fixed by us at 'arrays'"),
        (STOCK + "Krum", {"configrecord_key": "n"}, "is refused: it is fixed by us at 'config'"),
        (STOCK + "QFedAvg", {"train_loss_key": "l", "client_learning_rate": 1}, "is refused: it is fixed by us at 'train_loss'"),
        (STOCK + "Krum", {"train_metrics_aggr_fn": "f"}, "strategy.train_metrics_aggr_fn='f' is refused: fixed by us, history.jsonl"),
        (STOCK + "Krumm", {}, "flwr.serverapp.strategy has no 'Krumm'; did you mean 'Krum'?"),
        (OURS + "Legacy", {}, "is a strategy of Flower's legacy interface (configure_fit): name its like in flwr.serverapp.strategy"),
        (OURS + "Unfinished", {}, "is abstract: name a class that has aggregate_evaluate, configure_evaluate, summary"),
        (OURS + "Velocity", {}, "strategy.decay is missing and has no default: give strategy.decay=VALUE"),
        (OURS + "Velocity", {"decay": 0.5, "fraction_train": 1}, "strategy.fraction_train=1 is refused"),
        (OURS + "Annotated", {"count": 1.5}, "strategy.count=1.5 does not fit; allowed: a whole number"),
        (OURS + "Annotated", {"count": True}, "strategy.count=True does not fit; allowed: a whole number"),
        (OURS + "Annotated", {"share": "half"}, "strategy.share='half' does not fit; allowed: a finite number"),
        (OURS + "Annotated", {"flag": 1}, "strategy.flag=1 does not fit; allowed: true or false"),
        (OURS + "Annotated", {"word": 1}, "strategy.word=1 does not fit; allowed: text"),
        (OURS + "Annotated", {"free": [1, {}]}, "strategy.free=[1, {}] does not fit; allowed: a finite number, text, true"),
        ("fedunlearn.methods.npo.NPO", {}, "strategy._target_='fedunlearn.methods.npo.NPO' is not a ServerOptimizer or a Flower strategy (flwr.serverapp.strategy.*): give the import path"),
        ("json.dumps", {}, "strategy._target_='json.dumps' is not a ServerOptimizer or a Flower strategy"),
        (STOCK + "Result", {}, "is not a ServerOptimizer or a Flower strategy"),
        ("???", {}, "strategy._target_ is missing: give the import path of a frozen dataclass that subclasses fedunlearn.aggregation.base.ServerOptimizer or of a Flower strategy"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_key_value_allowed_and_way_out(plain, target, parameters, said):
    told = faults(plain, target, **parameters)
    assert len(told) == 1
    assert said in told[0]


def test_what_we_fix_need_not_be_given(plain):
    taken = parse_config({**plain, "strategy": {"_target_": OURS + "Demanding"}}).strategy
    assert taken == FlowerStrategy(target=OURS + "Demanding")


def test_all_faults_of_a_strategy_are_told_at_once(plain):
    told = faults(plain, OURS + "Velocity", decai=1, min_train_nodes=3, rates={"a": 1})
    assert [fault.split("=")[0].split(" ")[0] for fault in told] == [
        "strategy.decai",
        "strategy.min_train_nodes",
        "strategy.rates",
        "strategy.decay",
    ]


def test_values_of_each_plain_kind_arrive(plain):
    given = {"count": 3, "share": 1, "flag": True, "word": "x", "maybe": None, "free": [1, "b", [0.5, None]]}
    taken = parse_config({**plain, "strategy": {"_target_": OURS + "Annotated", **given}}).strategy
    assert taken == FlowerStrategy(target=OURS + "Annotated", parameters=given)


def test_a_strategy_that_is_no_mapping_is_told_both_ways_out(plain):
    with pytest.raises(
        UserError,
        match=r"strategy='krum' does not fit; allowed: a ServerOptimizer: _target_ and its parameters \(choose a member of the group\) or a Flower strategy "
        r"\(flwr.serverapp.strategy.\*\): _target_ and its parameters",
    ):
        parse_config({**plain, "strategy": "krum"})


def test_behind_kwargs_the_next_constructor_counts():
    from helpers_strategies import Patient, Velocity

    assert {"decay", "rates", "fraction_train", "min_available_nodes"} <= set(constructor_parameters(Velocity))
    assert constructor_parameters(Patient) == {}


def test_the_ground_knows_no_flower():
    """Importing the record alone brings in no Flower."""
    import subprocess
    import sys

    code = "import sys, fedunlearn.aggregation.flower; sys.exit('flwr' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
