"""The parser, on plain dicts: what is read, and how each fault is told."""

import copy
import re
from dataclasses import dataclass

import pytest
from helpers_components import HERE

from fedunlearn.aggregation.robust.off import Off
from fedunlearn.config.launcher import RayLauncher
from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.config.server import AggregationConfig, GateConfig
from fedunlearn.errors import UserError
from fedunlearn.methods.grad_ascent import GradAscent
from fedunlearn.methods.npo import NPO
from fedunlearn.partitions.base import Partitioner
from fedunlearn.partitions.iid import Iid

PLAIN = {
    "task_name": "t",
    "mode": "unlearn",
    "tofu_path": "folder",
    "forget_split": "forget10",
    "retain_split": "retain90",
    "model": {
        "model_args": {
            "pretrained_model_name_or_path": "base",
            "lora_config": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        }
    },
    "trainer": {
        "name": "FederatedUnlearningTrainer",
        "args": {"learning_rate": 1e-3},
        "federated": {"num_clients": 4, "num_rounds": 2},
    },
    "strategy": {"_target_": "fedunlearn.aggregation.fedavg.FedAvg"},
    "protocol": {"_target_": "fedunlearn.protocols.in_round.InRound"},
    "partition": {"scheme": {"_target_": "fedunlearn.partitions.iid.Iid", "seed": 3}},
    "launcher": {"_target_": "fedunlearn.config.launcher.LocalLauncher"},
    "data": {"rows": "forget_and_retain"},
    "method": {"_target_": "fedunlearn.methods.npo.NPO", "beta": 0.2},
}


@dataclass(frozen=True, kw_only=True)
class Reversed(Partitioner):
    """A user's own member, outside the package."""

    blocks: tuple[int, ...] = ()
    strict: bool = False

    def __post_init__(self):
        if self.strict:
            raise ValueError("strict is not for us")

    def deal(self, num_authors, num_clients):
        return tuple((author,) for author in reversed(range(num_authors)))


class NoDataclass(Partitioner):
    def deal(self, num_authors, num_clients):
        return ()


def changed(**by_dotted_key):
    """PLAIN with values at `a__b__c`; the value `del` removes the key."""
    data = copy.deepcopy(PLAIN)
    for dotted, value in by_dotted_key.items():
        *parents, name = dotted.split("__")
        inner = data
        for parent in parents:
            inner = inner[parent]
        if value == "del":
            del inner[name]
        else:
            inner[name] = value
    return data


def faults(**by_dotted_key):
    with pytest.raises(UserError, match=r"\w") as caught:
        parse_config(changed(**by_dotted_key))
    return list(caught.value.faults)


def test_values_arrive_and_defaults_stand():
    run = parse_config(PLAIN)
    assert isinstance(run, TrainRun)
    assert run.method == NPO(beta=0.2)
    assert run.partition.scheme == Iid(seed=3)
    assert run.model.model_args.lora_config.lora_alpha == 8.0
    assert run.trainer.args.max_steps == -1
    assert (run.aggregation, run.robust, run.gate) == (AggregationConfig(), Off(), GateConfig())
    assert (run.partition.ranks, run.partition.lora_alphas, run.ranks_differ) == (None, None, False)


def test_the_mode_chooses_the_record():
    shared = {
        key: value
        for key, value in PLAIN.items()
        if key not in ("trainer", "strategy", "protocol", "partition", "data", "method")
    }
    forget_prob = {"_target_": "fedunlearn.metrics.probability.Probability", "of": "forget"}
    eval_run = parse_config({**shared, "mode": "eval", "eval": {"metrics": {"forget_Q_A_Prob": forget_prob}}})
    assert isinstance(eval_run, EvalRun)
    with pytest.raises(
        UserError, match=r"mode='unlern' is unknown; did you mean 'unlearn'\? Known: train, unlearn, eval"
    ):
        parse_config({**PLAIN, "mode": "unlern"})


@pytest.mark.parametrize(("given", "read"), [(1, 1.0), ("1e-5", 1e-5), (0.25, 0.25)])
def test_floats_may_be_whole_numbers_or_text(given, read):
    rate = parse_config(changed(trainer__args__learning_rate=given)).trainer.args.learning_rate
    assert (rate, type(rate)) == (read, float)


@pytest.mark.parametrize("value", ["q_proj", ["q_proj", "v_proj"], None])
def test_a_union_takes_each_of_its_members(value):
    names = parse_config(
        changed(model__model_args__lora_config__target_modules=value)
    ).model.model_args.lora_config.target_modules
    assert names == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("trainer__args__learning_rate", "abc", "trainer.args.learning_rate='abc' does not fit; allowed: a finite number"),
        ("trainer__args__learning_rate", "nan", "trainer.args.learning_rate='nan' does not fit; allowed: a finite number"),
        ("trainer__args__learning_rate", True, "trainer.args.learning_rate=True does not fit"),
        ("trainer__args__max_steps", True, "trainer.args.max_steps=True does not fit; allowed: a whole number"),
        ("trainer__args__max_steps", 2.0, "trainer.args.max_steps=2.0 does not fit; allowed: a whole number"),
        ("trainer__args__bf16", 1, "trainer.args.bf16=1 does not fit; allowed: true or false"),
        ("trainer__args__optim", "adamw_torhc", "does not fit; did you mean 'adamw_torch'? allowed: adamw_torch, adamw_torch_fused, sgd"),
        ("task_name", 2024, "task_name=2024 does not fit; allowed: text (quote it"),
        ("model__model_args__lora_config__target_modules", ["q_proj", 3], "lora_config.target_modules[1]=3 does not fit; allowed: text"),
        ("model__model_args__lora_config", 3, "lora_config=3 does not fit; allowed: the keys of a LoraArgs or null"),
        ("trainer__args", [1], "trainer.args=[1] does not fit; allowed: the keys of a TrainArgs"),
        ("partition__scheme", "iid", "partition.scheme='iid' does not fit; allowed: a Partitioner: _target_ and its parameters"),
        ("trainer__args__learning_rate", "???", "trainer.args.learning_rate is missing and has no default: give trainer.args.learning_rate=VALUE"),
        ("trainer__args__seed", "???", "trainer.args.seed is missing"),
        ("task_name", "del", "task_name is missing"),
        ("data__rows", "full", "data.rows='full' does not fit mode='unlearn': allowed here: forget_and_retain"),
        ("trainer__args__learing_rate", 1, "trainer.args.learing_rate=1 is an unknown key; did you mean 'learning_rate'? Known: adam_beta1"),
        ("trainer__args__fp16", True, "trainer.args.fp16=True is refused: "),
        ("strategy__mu", 1, "strategy.mu=1 is an unknown key. FedAvg has no parameters"),
        ("method__betta", 1, "method.betta=1 is an unknown key; did you mean 'beta'? Known: alpha, beta, gamma, retain"),
        ("model__model_args__use_lora", False, "model.model_args.use_lora=false in a federated run: only adapters travel"),
        ("trainer__federated__num_clients", 0, "trainer.federated.num_clients=0 must be above 0"),
        ("method___target_", "fedunlearn.methods.npo.NPOO", "fedunlearn.methods.npo has no 'NPOO'; did you mean 'NPO'?"),
        ("method___target_", "fedunlearn.methods.nqo.NPO", "method._target_='fedunlearn.methods.nqo.NPO' cannot be imported"),
        ("method___target_", "fedunlearn.partitions.iid.Iid", "method._target_='fedunlearn.partitions.iid.Iid' is not an Unlearner: give the import path"),
        ("method___target_", "npo", "method._target_='npo' is no import path (package.module.Class)"),
        ("method___target_", "del", "method._target_ is missing: give the import path of a frozen dataclass that subclasses"),
        ("partition__scheme", {"_target_": f"{__name__}.NoDataclass"}, "NoDataclass' is not a Partitioner"),
        ("partition__scheme", {"_target_": f"{__name__}.Reversed", "strict": True}, "Reversed' cannot be built (ValueError: strict is not for us): correct partition.scheme.*, or choose another member"),
        ("partition__scheme", {"_target_": f"{HERE}.Dies"}, "partition.scheme._target_='helpers_components.Dies' cannot be built (KeyError: 'x')"),
        ("partition__scheme", {"_target_": f"{HERE}.Dies", "how": "zero"}, "'helpers_components.Dies' cannot be built (ZeroDivisionError: "),
        ("partition__scheme", {"_target_": f"{HERE}.Lists", "shares": ["much"]}, "partition.scheme.shares[0]='much' does not fit; allowed: a finite number"),
        ("partition__scheme", {"_target_": f"{HERE}.Lists", "shares": 0.5}, "partition.scheme.shares=0.5 does not fit; allowed: a list, each a finite number"),
        ("partition__scheme", {"_target_": f"{HERE}.Lists", "pairs": 1}, "partition.scheme.pairs=1 does not fit; allowed: a list, each a whole number"),
        ("partition__scheme", {"_target_": f"{HERE}.Lists", "table": {"a": 1}}, "partition.scheme.table={'a': 1} does not fit; allowed: frozenset[float], which a config cannot hold"),
        ("strategy___target_", f"{HERE}.Half", "strategy._target_='helpers_components.Half' is abstract: name a class that has moment_names, more"),
        ("strategy___target_", f"{HERE}.Unread", "strategy._target_='helpers_components.Unread': its type hints cannot be read (NameError: name 'Unknown' is not defined)"),
        ("strategy___target_", "helpers_broken_import.Any", "strategy._target_='helpers_broken_import.Any' cannot be imported (KeyError: 'no such setting'): correct that module"),
        ("strategy___target_", 5, "strategy._target_=5 must be text: give the import path of a frozen dataclass"),
        ("method___target_", None, "method._target_=null must be text: give the import path of a frozen dataclass"),
        ("aggregation", {"weights": None}, "aggregation.weights=null is not allowed; allowed: owned, trained, uniform, product_norm"),
    ],
)  # fmt: skip
def test_a_fault_is_told_with_key_value_allowed_and_way_out(where, value, said):
    told = faults(**{where: value})
    assert len(told) == 1
    assert said in told[0]


def test_a_class_of_the_users_own_is_read_by_its_hints():
    run = parse_config(changed(partition__scheme={"_target_": f"{__name__}.Reversed", "blocks": [2, 3]}))
    assert run.partition.scheme == Reversed(blocks=(2, 3))


def test_lists_of_the_users_own_are_lists():
    given = {"_target_": f"{HERE}.Lists", "shares": [1, "0.5"], "pairs": [2]}
    scheme = parse_config(changed(partition__scheme=given)).partition.scheme
    assert (scheme.shares, scheme.pairs) == ([1.0, 0.5], (2,))


def test_a_parameter_that_a_method_fixes_cannot_be_set():
    ascent = {"_target_": "fedunlearn.methods.grad_ascent.GradAscent"}
    assert parse_config(changed(method=ascent)).method == GradAscent()
    assert faults(method={**ascent, "alpha": 2}) == [
        "method.alpha=2 cannot be set: GradAscent fixes it at 0.0; leave it out"
    ]


def test_every_fault_is_told_at_once():
    told = faults(
        strategi="fedavg",
        task_name="del",
        trainer__args__bf16="yes",
        method__beta=0,
        data__rows="forget",
        launcher___target_="json.dumps",
    )
    for key in (
        "strategi=",
        "task_name is missing",
        "trainer.args.bf16=",
        "method.beta=0",
        "data.rows=",
        "launcher._target_=",
    ):
        assert len([fault for fault in told if fault.startswith(key)]) == 1
    assert len(told) == 6


def test_a_records_own_faults_are_all_told():
    told = faults(trainer__args={"learning_rate": -1, "max_steps": 0, "warmup_steps": 3, "warmup_epochs": 1})
    assert [re.split("[= ]", fault)[0] for fault in told] == [
        f"trainer.args.{key}" for key in ("learning_rate", "max_steps", "warmup_epochs")
    ]


@pytest.mark.parametrize("ratio", [0, -16, 1e7])
def test_a_ratio_of_learning_rates_that_cannot_be(ratio):
    assert faults(trainer__args={"learning_rate": 1e-4, "loraplus_lr_ratio": ratio}) == [
        f"trainer.args.loraplus_lr_ratio={float(ratio)} must lie between 1e-6 and 1e6; null or 1: B learns at A's rate"
    ]


def test_a_records_own_rules_wait_for_its_fields():
    assert faults(trainer__federated={"num_clients": "many", "num_rounds": 0}) == [
        "trainer.federated.num_clients='many' does not fit; allowed: a whole number"
    ]


def test_the_other_launcher_is_read():
    ray = {"_target_": "fedunlearn.config.launcher.RayLauncher", "client_cpus": 1, "threads": None}
    assert parse_config(changed(launcher=ray)).launcher == RayLauncher(client_cpus=1.0, threads=None)


def test_the_input_is_not_changed():
    before = copy.deepcopy(PLAIN)
    parse_config(PLAIN)
    assert before == PLAIN
