"""Which choices of the server go together: every refusal from the command line, and every pair that stands."""

import dataclasses
import itertools
import re
from functools import cache
from pathlib import Path

import pytest

from fedunlearn.aggregation.combinations import Combination, combination_faults
from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.config.parse import parse_config
from fedunlearn.config.server import AggregationConfig
from fedunlearn.doors.compose import compose
from fedunlearn.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"
PRESETS = sorted(path.stem for path in (CONFIGS / "aggregation").glob("*.yaml"))
OPTIMIZERS = sorted(path.stem for path in (CONFIGS / "strategy").glob("*.yaml"))
ROBUSTS = sorted(path.stem for path in (CONFIGS / "robust").glob("*.yaml"))
STOCK = "flwr.serverapp.strategy."
KRUM, MEDIAN = (f"strategy._target_={STOCK}{name}" for name in ("Krum", "FedMedian"))
STRATEGIES = [*(f"strategy={name}" for name in OPTIMIZERS), KRUM, MEDIAN]
RANKS = "partition.ranks=[1,2,3,4,5]"
ALPHAS = "partition.lora_alphas=[1,2,3,4,5.5]"
NINE = "trainer.federated.num_clients=9"
WORDS = {
    "weights": ("owned", "trained", "uniform", "product_norm"),
    "mask": ("both", "b", "alternate"),
    "reducer": ("factors", "padded_factors", "trimmed_mean", "product", "stack"),
    "residual": ("dropped", "sidecar", "feedback"),
    "gauge": ("as_is", "balanced", "orthonormal", "procrustes", "reset"),
}


def run_of(*overrides, primary="train-lora.yaml"):
    return compose(CONFIGS, primary, ["task_name=t", *overrides]).run


def faults(*overrides, primary="train-lora.yaml"):
    with pytest.raises(UserError, match=r"\w") as caught:
        run_of(*overrides, primary=primary)
    return list(caught.value.faults)


def agg(**values):
    return [f"aggregation.{key}={value}" for key, value in values.items()]


def all_combinations():
    """Every word of every choice with a strategy of each kind, robust weights on and off, ranks equal and unequal: 9600."""
    kinds = (
        ("FedAvg", False, True, False),
        ("FedAdam", True, False, False),
        ("Signs", False, False, False),
        (STOCK + "Krum", False, False, True),
    )
    for values in itertools.product(*WORDS.values(), kinds, (False, True), (False, True)):
        *choices, (strategy, moments, sends_mean, foreign), reweighs, differ = values
        yield Combination(
            **dict(zip(WORDS, choices, strict=True)),
            strategy=strategy,
            moments=moments,
            sends_mean=sends_mean,
            foreign=foreign,
            robust="Krum" if reweighs else "Off",
            reweighs=reweighs,
            ranks_differ=differ,
        )


def makes_sense(c):
    """The same law the other way round: for each reducer what it goes with, then what each strategy and unequal ranks go with."""
    both, plain = c.mask == "both", ("as_is", "balanced", "orthonormal")
    of_reducer = {
        "factors": c.gauge in (*plain, "procrustes") and c.residual != "feedback"
        if both
        else c.gauge in plain and c.residual == "dropped",
        "padded_factors": both and c.gauge in plain and c.residual != "feedback",
        "trimmed_mean": not both
        and c.gauge in plain
        and c.residual == "dropped"
        and c.weights == "uniform"
        and not c.reweighs,
        "product": both and c.gauge in ("balanced", "orthonormal"),
        "stack": both and c.gauge == "reset" and c.residual == "sidecar",
    }[c.reducer]
    of_strategy = True
    if c.moments:
        of_strategy = c.gauge in ("as_is", "procrustes")
    if not c.sends_mean:
        of_strategy = of_strategy and c.residual == "dropped"
    if c.foreign:
        of_strategy = (c.reducer, c.residual, c.gauge, c.reweighs) == ("factors", "dropped", "as_is", False)
        of_strategy = of_strategy and c.mask != "alternate"
    of_ranks = not c.ranks_differ or (both and not c.foreign and c.reducer in ("padded_factors", "product", "stack"))
    return of_reducer and of_strategy and of_ranks


def split(fault):
    """What is wrong, and the way out."""
    told, _, way_out = re.split("(choose|it goes with|one shape:) ", fault)
    return told, way_out


def advised(way_out):
    """What a way out says to change: each alternative alone, and what stands with `and` together."""
    words = re.findall(r"(mask|reducer|residual|gauge|weights|robust)=(\w+)", way_out)
    words = words or [("gauge", word) for word in re.findall(r"\b(as_is|balanced|orthonormal)\b", way_out)]
    return [words] if " and " in way_out else [[word] for word in words]


def after(c, changes):
    chosen = dict(changes)
    off = {"robust": "Off", "reweighs": False} if chosen.pop("robust", None) else {}
    return dataclasses.replace(c, **chosen, **off)


class TestTheLaw:
    def test_what_is_refused_is_what_makes_no_sense(self):
        wrong = [c for c in all_combinations() if (not combination_faults(c)) != makes_sense(c)]
        assert not wrong
        assert sum(map(makes_sense, all_combinations())) > 100

    def test_every_message_names_two_keys_with_their_values_and_a_way_out(self):
        said = {fault for c in all_combinations() for fault in combination_faults(c)}
        assert len(said) > 50
        for fault in said:
            told, way_out = split(fault)
            keys = re.findall(r"(?:mask|reducer|residual|gauge|weights|robust)=\w+|strategy \S+|partition\.ranks", told)
            assert len(keys) >= 2 or "is Flower's" in told, fault
            assert advised(way_out) or "aggregation=" in way_out or way_out == "leave them null", fault

    def test_the_way_out_of_every_message_is_one(self):
        """Whoever does what a message says hears it no more."""
        for c in all_combinations():
            for fault in combination_faults(c):
                for changes in advised(split(fault)[1]):
                    assert fault not in combination_faults(after(c, changes)), (fault, changes)


REFUSED = {
    "mask b, padded": (
        [*agg(mask="b", reducer="padded_factors")],
        r"aggregation\.mask=b beside aggregation\.reducer=padded_factors: with one factor the same for all.*choose reducer=factors or mask=both",
    ),
    "mask alternate, product": (
        ["aggregation=flexlora", *agg(mask="alternate")],
        r"aggregation\.mask=alternate beside aggregation\.reducer=product: with one factor the same for all",
    ),
    "mask b, sidecar": (
        ["aggregation=ffa", *agg(residual="sidecar")],
        r"aggregation\.mask=b beside aggregation\.residual=sidecar: the mean of one factor is exact, nothing is left over; choose residual=dropped or mask=both",
    ),
    "mask alternate, sidecar": (
        ["aggregation=rolora", *agg(residual="sidecar")],
        r"aggregation\.mask=alternate beside aggregation\.residual=sidecar",
    ),
    "mask b, procrustes": (
        ["aggregation=fedrot", *agg(mask="b")],
        r"aggregation\.mask=b beside aggregation\.gauge=procrustes: that gauge changes both factors.*choose as_is, balanced or orthonormal",
    ),
    "trimmed mean, both factors": (
        [*agg(reducer="trimmed_mean", trim=0.2, weights="uniform")],
        r"aggregation\.reducer=trimmed_mean beside mask=both: entries of two factors mean nothing apart; choose mask=b or mask=alternate",
    ),
    "trimmed mean, weights": (
        ["aggregation=ffa", *agg(reducer="trimmed_mean", trim=0.2)],
        r"aggregation\.reducer=trimmed_mean beside aggregation\.weights=owned and robust=Off: it counts every client once; choose weights=uniform and robust=off",
    ),
    "trimmed mean, robust": (
        ["aggregation=ffa", *agg(reducer="trimmed_mean", trim=0.2, weights="uniform"), "robust=norm_clipping"],
        r"aggregation\.reducer=trimmed_mean beside aggregation\.weights=uniform and robust=NormClipping: it counts every client once",
    ),
    "stack, not reset": (
        ["aggregation=flora", *agg(gauge="as_is")],
        r"aggregation\.reducer=stack beside aggregation\.gauge=as_is: a stack leaves the factors empty.*choose both \(aggregation=flora\) or neither",
    ),
    "reset, no stack": (
        [*agg(gauge="reset")],
        r"aggregation\.reducer=factors beside aggregation\.gauge=reset: a stack leaves the factors empty",
    ),
    "stack, dropped": (
        ["aggregation=flora", *agg(residual="dropped")],
        r"aggregation\.reducer=stack beside aggregation\.residual=dropped: all that was learnt would be thrown away; choose residual=sidecar",
    ),
    "product, as is": (
        ["aggregation=flexlora", *agg(gauge="as_is")],
        r"aggregation\.reducer=product beside aggregation\.gauge=as_is: its factors come out of an SVD; choose gauge=balanced or gauge=orthonormal",
    ),
    "procrustes, padded": (
        ["aggregation=fedrot", *agg(reducer="padded_factors")],
        r"aggregation\.gauge=procrustes beside aggregation\.reducer=padded_factors: turning factors changes their mean alone; choose reducer=factors",
    ),
    "feedback, factors": (
        [*agg(residual="feedback")],
        r"aggregation\.residual=feedback beside aggregation\.reducer=factors: only an exact product can take up.*choose reducer=product or residual=sidecar",
    ),
    "feedback, padded": (
        ["aggregation=hetlora", *agg(residual="feedback")],
        r"aggregation\.residual=feedback beside aggregation\.reducer=padded_factors",
    ),
    **{
        f"{name}, {gauge}": (
            [f"strategy={name}", *agg(gauge=gauge)],
            rf"strategy {kind} beside aggregation\.gauge={gauge}: its moments belong to entries of the factors.*choose fedavg or fedprox, or aggregation=fedit",
        )
        for (name, kind), gauge in itertools.product(
            (("fedadagrad", "FedAdagrad"), ("fedadam", "FedAdam"), ("fedavgm", "FedAvgM"), ("fedyogi", "FedYogi")),
            ("balanced", "orthonormal"),
        )
    },
    "one's own, sidecar": (
        ["strategy._target_=helpers_components.Signs", "aggregation=fedex"],
        r"strategy Signs beside aggregation\.residual=sidecar: what is left over belongs to the mean itself.*or residual=dropped \(one of your own that does send it says so by its property sends_mean\)",
    ),
    "one's own, feedback": (
        ["strategy._target_=helpers_components.Signs", "aggregation=flexlora", "aggregation.residual=feedback"],
        r"strategy Signs beside aggregation\.residual=feedback: what is left over belongs to the mean itself",
    ),
    "fedadam, sidecar": (
        ["strategy=fedadam", "aggregation=fedex"],
        r"strategy FedAdam beside aggregation\.residual=sidecar: what is left over belongs to the mean itself.*choose fedavg or fedprox, or residual=dropped",
    ),
    **{
        f"Flower's, {name}": (
            [KRUM, *others],
            r"strategy flwr\.serverapp\.strategy\.Krum is Flower's and does its own averaging, per factor: it goes with aggregation\.reducer=factors, "
            r"residual=dropped, gauge=as_is and robust=off only",
        )
        for name, others in {
            "hetlora": ["aggregation=hetlora"],
            "fedex": ["aggregation=fedex"],
            "flora": ["aggregation=flora"],
            "fedrot": ["aggregation=fedrot"],
            "robust": ["robust=geometric_median"],
        }.items()
    },
    "Flower's, alternate": (
        [MEDIAN, "aggregation=rolora"],
        r"strategy flwr\.serverapp\.strategy\.FedMedian is Flower's and wants the same tensors in every round: aggregation\.mask=alternate sends others; choose mask=both or mask=b",
    ),
    "ranks, fedit": (
        [RANKS],
        r"partition\.ranks or lora_alphas give clients a rank or scale of their own, but aggregation\.reducer=factors needs factors of one: "
        r"choose aggregation=flora, flexlora or hetlora, or leave them null",
    ),
    "alphas, fedrot": (
        ["aggregation=fedrot", ALPHAS],
        r"partition\.ranks or lora_alphas give clients a rank or scale of their own, but aggregation\.reducer=factors",
    ),
    "softness alone": (
        [*agg(softness=0.5)],
        r"aggregation\.softness=0\.5 beside aggregation\.gauge=as_is: it is the softness of procrustes, wanted there \(0\.5 in FedRot\) and null elsewhere",
    ),
    "procrustes alone": (
        [*agg(gauge="procrustes")],
        r"aggregation\.softness=None beside aggregation\.gauge=procrustes: it is the softness of procrustes, wanted there",
    ),
    "softness 0": (
        ["aggregation=fedrot", *agg(softness=0)],
        r"aggregation\.softness=0\.0 must lie in \(0, 1\]: 1 turns all the way",
    ),
    "softness above 1": (
        ["aggregation=fedrot", *agg(softness=1.01)],
        r"aggregation\.softness=1\.01 must lie in \(0, 1\]",
    ),
    "trim alone": (
        [*agg(trim=0.1)],
        r"aggregation\.trim=0\.1 beside aggregation\.reducer=factors: it is what trimmed_mean leaves out at each end, wanted there and null elsewhere",
    ),
    **{
        f"trim {trim} of {clients}": (
            [
                "aggregation=ffa",
                *agg(reducer="trimmed_mean", weights="uniform", trim=trim),
                f"trainer.federated.num_clients={clients}",
            ],
            rf"^aggregation\.trim={trim} of the {clients} clients that trainer\.federated draws {said}$",
        )
        for trim, clients, said in (
            (0.2, 4, r"leaves out nobody: draw more, or raise it to 0\.25 at least"),
            (0.1, 3, r"leaves out nobody: draw more, or raise it to 0\.34 at least"),
            (0.49, 2, r"leaves out nobody: draw more"),
            (0.4999999999, 2, r"leaves nobody: draw more, or lower it"),
            (0.4999999999, 8, r"leaves nobody: draw more, or lower it"),
        )
    },
    "trim of those drawn": (
        [
            "aggregation=ffa",
            *agg(reducer="trimmed_mean", weights="uniform", trim=0.25),
            NINE,
            "trainer.federated.num_train_clients=3",
        ],
        r"aggregation\.trim=0\.25 of the 3 clients that trainer\.federated draws leaves out nobody",
    ),
    "a fraction that draws nobody": (
        ["trainer.federated.num_clients=4", "trainer.federated.fraction_train=1e-12"],
        r"^trainer\.federated\.fraction_train=1e-12 of num_clients=4 draws no client at all: raise it to 0\.25, or set num_train_clients$",
    ),
    **{
        f"overflow {override}": (
            [*more, override],
            rf"{re.escape(override.partition('=')[0])}={re.escape(str(float(override.partition('=')[2])))}.* 1e6",
        )
        for override, *more in (
            ("gate.max_norm_ratio=1e300",),
            ("gate.max_update_ratio=1e300",),
            ("gate.max_reply_ratio=1e300",),
            ("trainer.args.num_train_epochs=1e300",),
            ("trainer.federated.round_timeout=1e300",),
            ("trainer.federated.roll_call_timeout=1e300",),
            ("launcher.start_timeout=1e300", "launcher.isolate=true"),
            ("model.model_args.lora_config.lora_alpha=1e300",),
            ("model.model_args.lora_config.lora_alpha=1e-300",),
            ("robust.max_norm=1e300", "robust=norm_clipping"),
        )
    },
    **{
        f"tolerance {value}": (
            ["robust=geometric_median", f"robust.tolerance={value}"],
            rf".* robust\.tolerance={value} between 0 and 1$",
        )
        for value in (0.0, 1.0, -1.0)
    },
    "alphas that overflow": (
        ["aggregation=hetlora", "partition.lora_alphas=[1,2,3,4,1e300]"],
        r"partition\.lora_alphas=\[1\.0, 2\.0, 3\.0, 4\.0, 1e\+300\] must be numbers from 1e-6 to 1e6, one a client",
    ),
    "trimmed mean alone": (
        ["aggregation=ffa", *agg(reducer="trimmed_mean", weights="uniform")],
        r"aggregation\.trim=None beside aggregation\.reducer=trimmed_mean",
    ),
    **{
        f"trim {trim}": (
            ["aggregation=ffa", *agg(reducer="trimmed_mean", weights="uniform", trim=trim)],
            rf"aggregation\.trim={trim} must lie in \(0, 0\.5\)",
        )
        for trim in (0.0, 0.5, -0.1)
    },
    "sidecar_rank alone": (
        [*agg(sidecar_rank=4)],
        r"aggregation\.sidecar_rank=4 beside aggregation\.residual=dropped: there is no side-car; set residual=sidecar or leave it null",
    ),
    "sidecar_rank 0": (
        ["aggregation=fedex", *agg(sidecar_rank=0)],
        r"aggregation\.sidecar_rank=0 must be at least 1, or null \(exact: it grows\)",
    ),
    **{
        f"gate.{key}={value}": ([f"gate.{key}={value}"], rf"gate\.{key}={value} must {rule}")
        for key, value, rule in (
            ("max_norm_ratio", 1.0, r"be above 1 \(the median itself\), at most 1e6, or null for no bound"),
            ("max_norm_ratio", -2.0, r"be above 1"),
            (
                "max_update_ratio",
                0.0,
                r"be above 0 \(1 is as much as the adapter itself\), at most 1e6, or null for no bound",
            ),
            ("max_update_ratio", -1.0, r"be above 0"),
            ("max_client_share", 0.0, r"lie in \(0, 1\], or null for no cap"),
            ("max_client_share", 1.1, r"lie in \(0, 1\]"),
            ("max_reply_ratio", 0.9, r"be at least 1"),
        )
    },
    "krum, few clients": (
        ["robust=krum", "trainer.federated.num_clients=4"],
        r"robust Krum needs 5 updates a round, trainer\.federated draws 4 clients: draw more, lower robust\.num_malicious, or choose robust=off",
    ),
    "krum, a small fraction": (
        ["robust=krum", NINE, "trainer.federated.fraction_train=0.4"],
        r"robust Krum needs 5 updates a round, trainer\.federated draws 4 clients",
    ),
    "krum, a small count": (
        ["robust=krum", NINE, "trainer.federated.num_train_clients=4"],
        r"robust Krum needs 5 updates a round, trainer\.federated draws 4 clients",
    ),
    "krum, more malicious": (["robust=krum", "robust.num_malicious=2"], r"robust Krum needs 7 updates a round"),
    "multi-krum, more selected": (
        ["robust=multi_krum", "robust.num_selected=6"],
        r"robust MultiKrum needs 6 updates a round, trainer\.federated draws 5 clients",
    ),
    "nobody to force": (
        ["trainer.federated.force_owners=true"],
        r"trainer\.federated\.force_owners=true: nobody owns forget rows where nothing is unlearned; leave it false",
    ),
    **{
        f"{key} of too few": (
            ["aggregation=hetlora", f"partition.{key}=[2,2,2]"],
            rf"partition\.{key} has 3 entries, trainer\.federated\.num_clients=5: give one a client, or null",
        )
        for key in ("ranks", "lora_alphas")
    },
    "rank 0": (
        ["aggregation=hetlora", "partition.ranks=[1,2,3,4,0]"],
        r"partition\.ranks=\[1, 2, 3, 4, 0\] must be whole numbers from 1, one a client",
    ),
    "no ranks": (["aggregation=hetlora", "partition.ranks=[]"], r"partition\.ranks=\[\] must be whole numbers from 1"),
    "half a rank": (
        ["aggregation=hetlora", "partition.ranks=[1,2,3,4,0.5]"],
        r"partition\.ranks\[4\]=0\.5 does not fit; allowed: a whole number",
    ),
    "alpha 0": (
        ["aggregation=hetlora", "partition.lora_alphas=[1,2,3,4,0]"],
        r"partition\.lora_alphas=\[1\.0, 2\.0, 3\.0, 4\.0, 0\.0\] must be numbers from 1e-6 to 1e6, one a client",
    ),
    **{
        f"{count} a round": (
            [f"trainer.federated.num_train_clients={count}"],
            rf"trainer\.federated\.num_train_clients={count} must lie between 1 and num_clients=5, or be null \(by fraction_train\)",
        )
        for count in (6, -1)
    },
    "count and fraction": (
        ["trainer.federated.num_train_clients=2", "trainer.federated.fraction_train=0.5"],
        r"trainer\.federated\.num_train_clients=2 beside fraction_train=0\.5: give one of the two \(fraction_train=1\.0 is none\)",
    ),
    **{
        f"min_clients above the cohort, {name}": (
            [f"trainer.federated.min_clients={least}", *others],
            rf"trainer\.federated\.min_clients={least} must lie between 1 and the clients drawn each round, {drawn} of num_clients=5: "
            r"lower it, or raise fraction_train or num_train_clients",
        )
        for name, least, drawn, others in (
            ("all", 6, 5, []),
            ("fraction", 3, 2, ["trainer.federated.fraction_train=0.4"]),
            ("count", 4, 3, ["trainer.federated.num_train_clients=3"]),
            ("none", 0, 5, []),
        )
    },
    **{
        f"{name}.{key}={value}": (
            [f"strategy={name}", f"strategy.{key}={value}"],
            rf"strategy\.{key}={value} is refused: {kind} wants {rule}; correct it, or leave it out for {default}$",
        )
        for name, kind, key, value, rule, default in (
            ("fedadam", "FedAdam", "tau", 0.0, r"a number above 0, at most 1e6", r"0\.001"),
            ("fedyogi", "FedYogi", "tau", -1e-3, r"a number above 0, at most 1e6", r"0\.001"),
            ("fedadagrad", "FedAdagrad", "tau", 0.0, r"a number above 0, at most 1e6", r"0\.001"),
            ("fedadam", "FedAdam", "beta_1", 1.0, r"a number in \[0, 1\)", r"0\.9"),
            ("fedadam", "FedAdam", "beta_2", -0.1, r"a number in \[0, 1\)", r"0\.99"),
            ("fedyogi", "FedYogi", "beta_2", 1.5, r"a number in \[0, 1\)", r"0\.99"),
            ("fedavgm", "FedAvgM", "momentum", 1.0, r"a number in \[0, 1\)", r"0\.9"),
            ("fedprox", "FedProx", "mu", -0.01, r"a number from 0 to 1e6", r"0\.01"),
            ("fedavgm", "FedAvgM", "server_lr", -1.0, r"a number above 0, at most 1e6", r"1\.0"),
            ("fedadam", "FedAdam", "server_lr", 0.0, r"a number above 0, at most 1e6", r"0\.001"),
            ("fedadam", "FedAdam", "v_init", -1.0, r"a number from 0 to 1e6", r"null"),
        )
    },
    "strategy nan": (
        ["strategy=fedadam", "strategy.tau=nan"],
        r"strategy\.tau=nan does not fit; allowed: a finite number",
    ),
    **{
        f"{others[0]} {others[-1]}": (others, said)
        for others, said in (
            (["robust=krum", "robust.num_malicious=-1"], r"robust\.num_malicious=-1 must not be negative"),
            (
                ["robust=multi_krum", "robust.num_selected=0"],
                r"robust\.num_selected=0 must be at least 1, or null for K - num_malicious - 2",
            ),
            (
                ["robust=norm_clipping", "robust.max_norm=0"],
                r"robust\.max_norm=0\.0 must be above 0, at most 1e6, or null for the round's median norm",
            ),
            (
                ["robust=geometric_median", "robust.max_iterations=0"],
                r"robust\.max_iterations=0 must lie between 1 and 1e6 and robust\.tolerance=1e-10 between 0 and 1",
            ),
            (["robust=geometric_median", "robust.tolerance=0"], r".* and robust\.tolerance=0\.0 between 0 and 1"),
        )
    },
    "unknown strategy": (
        ["strategy=fedavgm2"],
        r"strategy='fedavgm2' is unknown; did you mean 'fedavgm'\? Known: fedadagrad, fedadam, fedavg, fedavgm, fedprox, fedyogi \(configs/strategy/\)",
    ),
    "unknown preset": (
        ["aggregation=flor"],
        r"aggregation='flor' is unknown; did you mean 'flora'\? Known: fedex, fedit, .*rolora \(configs/aggregation/\)",
    ),
    "unknown robust": (
        ["robust=multikrum"],
        r"robust='multikrum' is unknown; did you mean 'multi_krum'\? Known: geometric_median, krum, multi_krum, norm_clipping, off \(configs/robust/\)",
    ),
    "unknown gate": (["gate=open"], r"gate='open' is unknown\. Known: default \(configs/gate/\)"),
    **{
        f"unknown {key}": ([f"aggregation.{key}={word}"], rf"aggregation\.{key}='{word}' does not fit; {said}")
        for key, word, said in (
            ("mask", "a", r"allowed: both, b, alternate"),
            (
                "reducer",
                "factor",
                r"did you mean 'factors'\? allowed: factors, padded_factors, trimmed_mean, product, stack",
            ),
            ("residual", "side_car", r"did you mean 'sidecar'\? allowed: dropped, sidecar, feedback"),
            (
                "gauge",
                "balance",
                r"did you mean 'balanced'\? allowed: as_is, balanced, orthonormal, procrustes, reset",
            ),
            ("weights", "examples", r"allowed: owned, trained, uniform, product_norm"),
        )
    },
    "a number for the rank of the export": (
        [*agg(export_rank=8)],
        r"aggregation\.export_rank=8 does not fit; allowed: exact, r$",
    ),
    "another strategy's key": (
        ["strategy=fedadam", "strategy.momentum=0.9"],
        r"strategy\.momentum=0\.9 is an unknown key\. Known: beta_1, beta_2, bias_correction, server_lr, tau, v_init\. Correct it or leave it out",
    ),
    "FedAvg's server_lr": (
        ["strategy.server_lr=1"],
        r"strategy\.server_lr=1 is an unknown key\. FedAvg has no parameters",
    ),
    "another robust's key": (
        ["robust=krum", "robust.num_selected=2"],
        r"robust\.num_selected=2 is an unknown key\. Known: num_malicious\. Correct it or leave it out",
    ),
    "off's key": (
        ["robust=off", "robust.num_malicious=1"],
        r"robust\.num_malicious=1 is an unknown key\. Off has no parameters",
    ),
    "an unknown choice of the aggregation": (
        ["aggregation.sidecar_rnk=3"],
        r"aggregation\.sidecar_rnk=3 is an unknown key; did you mean 'sidecar_rank'\? Known: export_rank, gauge, mask",
    ),
}


@pytest.mark.parametrize(("overrides", "said"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_with_its_reason(overrides, said):
    told = faults(*overrides)
    assert len(told) == 1
    assert re.match(said, told[0]), told


@pytest.mark.parametrize(
    ("overrides", "starts"),
    [
        (
            ["aggregation=flora", "strategy=fedyogi"],
            ["strategy FedYogi beside aggregation.gauge=reset", "strategy FedYogi beside aggregation.residual=sidecar"],
        ),
        (
            ["aggregation=ffa", RANKS],
            ["partition.ranks or lora_alphas give clients a rank or scale of their own, but", "partition.ranks or lora_alphas give clients a rank or scale of their own beside aggregation.mask=b"],
        ),
        (
            ["aggregation=flora", *agg(mask="b")],
            ["aggregation.mask=b beside aggregation.reducer=stack", "aggregation.mask=b beside aggregation.residual=sidecar", "aggregation.mask=b beside aggregation.gauge=reset"],
        ),
        (
            ["aggregation=hetlora", RANKS, KRUM],
            ["strategy flwr.serverapp.strategy.Krum is Flower's", "partition.ranks or lora_alphas give clients a rank or scale of their own, but strategy flwr.serverapp.strategy.Krum is Flower's"],
        ),
        (
            [*agg(softness=2, trim=1, sidecar_rank=0)],
            ["aggregation.softness=2.0 beside", "aggregation.softness=2.0 must", "aggregation.trim=1.0 beside", "aggregation.trim=1.0 must", "aggregation.sidecar_rank=0 beside", "aggregation.sidecar_rank=0 must"],
        ),
        (
            ["gate.max_norm_ratio=0", "gate.max_client_share=2", "gate.max_reply_ratio=0"],
            ["gate.max_norm_ratio=0.0", "gate.max_client_share=2.0", "gate.max_reply_ratio=0.0"],
        ),
        (
            ["strategy=fedadam", *(f"strategy.{key}=-1" for key in ("server_lr", "beta_1", "beta_2", "tau", "v_init"))],
            [f"strategy.{key}=-1.0 is refused" for key in ("server_lr", "beta_1", "beta_2", "tau", "v_init")],
        ),
        (
            ["strategy=fedavgm2", "aggregation=flor", "robust=krumm", "gate.max_reply_ratio=0"],
            ["strategy='fedavgm2'", "aggregation='flor'", "robust='krumm'", "gate.max_reply_ratio=0.0"],
        ),
        (
            ["robust=krum", RANKS, "trainer.federated.num_clients=4", "trainer.federated.force_owners=true"],
            ["robust Krum needs 5", "trainer.federated.force_owners", "partition.ranks has 5 entries", "partition.ranks or lora_alphas give clients"],
        ),
    ],
)  # fmt: skip
def test_all_faults_are_told_at_once(overrides, starts):
    told = faults(*overrides)
    assert len(told) == len(starts)
    assert all(fault.startswith(start) for fault, start in zip(told, starts, strict=True)), told


@cache
def composed(*overrides):
    return compose(CONFIGS, "train-lora.yaml", ["task_name=t", *overrides])


def preset(name):
    return composed(f"aggregation={name}").run.aggregation


def plain_of(name, strategy):
    """What Hydra makes of both choices: each fills its own group. Two of the pairs show it below."""
    return {**composed(f"aggregation={name}").plain, "strategy": composed(strategy).plain["strategy"]}


def combination_of(name, strategy):
    """What the pair is, from the preset's YAML and the strategy's kind, without a run."""
    chosen, foreign = preset(name), strategy.startswith("strategy._target_")
    kinds = {"fedavg": "FedAvg", "fedprox": "FedProx", "fedavgm": "FedAvgM", "fedadam": "FedAdam"}
    kinds |= {"fedyogi": "FedYogi", "fedadagrad": "FedAdagrad"}
    word = strategy.partition("=")[2]
    return Combination(
        **{key: getattr(chosen, key) for key in WORDS},
        strategy=word if foreign else kinds[word],
        moments=word in ("fedavgm", "fedadam", "fedyogi", "fedadagrad"),
        sends_mean=word in ("fedavg", "fedprox"),
        foreign=foreign,
        robust="Off",
        reweighs=False,
        ranks_differ=False,
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_and_a_strategy_go_together_or_are_refused_as_the_rules_say(name, strategy):
    wanted = combination_faults(combination_of(name, strategy))
    if wanted:
        with pytest.raises(UserError, match=r"^strategy ") as caught:
            parse_config(plain_of(name, strategy))
        assert list(caught.value.faults) == wanted
        return
    run = parse_config(plain_of(name, strategy))
    assert run.aggregation == preset(name)
    assert isinstance(run.strategy, FlowerStrategy) == strategy.startswith("strategy._target_")


@pytest.mark.parametrize(("name", "strategy"), [("fedrot", "strategy=fedyogi"), ("ffa", MEDIAN)])
def test_both_choices_on_one_command_line_are_those_two(name, strategy):
    assert compose(CONFIGS, "train-lora.yaml", ["task_name=t", f"aggregation={name}", strategy]).plain == plain_of(
        name, strategy
    )


def test_how_many_pairs_stand():
    """FedAvg and FedProx go with all nine; the four with moments with fedit, fedrot, ffa, hetlora, rolora; Flower's with fedit and ffa."""
    stands = {s: {p for p in PRESETS if not combination_faults(combination_of(p, s))} for s in STRATEGIES}
    assert stands["strategy=fedavg"] == stands["strategy=fedprox"] == set(PRESETS)
    for name in ("fedavgm", "fedadam", "fedyogi", "fedadagrad"):
        assert stands[f"strategy={name}"] == {"fedit", "fedrot", "ffa", "hetlora", "rolora"}
    assert stands[KRUM] == stands[MEDIAN] == {"fedit", "ffa"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_strategy_of_the_users_goes_with_every_preset_where_it_says_that_it_sends_the_mean(name):
    for word, stands in (("Mean", True), ("Signs", preset(name).residual == "dropped")):
        plain = {**composed(f"aggregation={name}").plain, "strategy": {"_target_": f"helpers_components.{word}"}}
        if stands:
            assert parse_config(plain).strategy.sends_mean == (word == "Mean")
        else:
            with pytest.raises(UserError, match=r"^strategy Signs beside aggregation\.residual=sidecar"):
                parse_config(plain)


@pytest.mark.parametrize("name", PRESETS)
class TestPresets:
    def test_each_composes_with_fedavg_for_unlearning_too(self, name):
        assert run_of(f"aggregation={name}", primary="unlearn-lora.yaml").aggregation == preset(name)

    @pytest.mark.parametrize("given", [RANKS, ALPHAS])
    def test_unequal_ranks_go_with_three_of_them(self, name, given):
        if name in ("flora", "flexlora", "hetlora"):
            assert run_of(f"aggregation={name}", given).ranks_differ
            return
        assert all(
            "partition.ranks or lora_alphas give clients" in fault for fault in faults(f"aggregation={name}", given)
        )


@pytest.mark.parametrize("name", ROBUSTS)
def test_every_robust_weighting_composes_with_enough_clients_and_says_what_it_needs(name):
    run = run_of(f"robust={name}", NINE)
    assert run.robust.min_updates == {"krum": 5, "multi_krum": 5}.get(name, 1)
    assert run.robust.reads_gram == (name != "off")


def test_the_defaults_are_fedit_with_fedavg_and_no_robust_weights():
    run = run_of()
    assert run.aggregation == AggregationConfig() == preset("fedit")
    assert (type(run.strategy).__name__, type(run.robust).__name__) == ("FedAvg", "Off")


@pytest.mark.parametrize(
    ("given", "drawn"),
    [
        ({}, 100),
        ({"fraction_train": 0.31}, 31),
        ({"fraction_train": 0.311}, 32),
        ({"fraction_train": 0.07}, 7),
        ({"fraction_train": 0.001}, 1),
        ({"num_train_clients": 1}, 1),
        ({"num_train_clients": 100}, 100),
    ],
)
def test_how_many_are_drawn_each_round(given, drawn):
    """ceil(fraction x 100), and 0.07 x 100 = 7.000000000000001 in floating point is 7 clients, not 8."""
    overrides = [f"trainer.federated.{key}={value}" for key, value in given.items()]
    assert run_of("trainer.federated.num_clients=100", *overrides).trainer.federated.cohort_size == drawn


def test_the_most_that_min_clients_can_be_is_the_cohort():
    drawn = run_of("trainer.federated.num_train_clients=3", "trainer.federated.min_clients=3").trainer.federated
    assert drawn.cohort_size == drawn.min_clients == 3


def test_forced_owners_belong_to_unlearning():
    run = run_of("trainer.federated.force_owners=true", primary="unlearn-lora.yaml")
    assert run.trainer.federated.force_owners
