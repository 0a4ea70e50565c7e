"""What averaging AdaLoRA's A, E and B apart misses of the mean of the products, against the dense way to the same numbers."""

import pytest
import torch

from fedunlearn.aggregation.adalora import scales_of_triplets
from fedunlearn.aggregation.gauges.base import Gauge
from fedunlearn.aggregation.reduce import Choices, Cohort, reduce_round
from fedunlearn.aggregation.reducers.factor_mean import FactorMean
from fedunlearn.aggregation.robust.off import Off
from fedunlearn.federation.rank_budget import error_of_triplets

SIZES = {"base_model.model.one": (5, 7), "base_model.model.two": (6, 4)}
WEIGHTS = {0: 0.5, 3: 0.3, 7: 0.2}


def made(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"{p}{end}": s for p, (o, i) in SIZES.items() for end, s in ((".lora_A", (3, i)), (".lora_E", (3, 1)), (".lora_B", (o, 3)))}  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def product(tensors, path):
    a, e, b = (tensors[path + end].double() for end in (".lora_A", ".lora_E", ".lora_B"))
    return 6 / (4 + 1e-5) * b @ torch.diag(e[:, 0]) @ a


def measured(clients):
    start = made(0)
    scales = scales_of_triplets({"init_r": 4, "lora_alpha": 6}, start)
    cohort = Cohort(adapter=start, scales=scales, weights=WEIGHTS, read=lambda k, name: clients[k][name], round=1, seed=0)  # fmt: skip
    reduced = reduce_round(Choices(reducer=FactorMean(), gauge=Gauge(), robust=Off()), cohort)
    assert set(reduced.mean) == set(start)
    return reduced, error_of_triplets(cohort, reduced)


def test_it_is_the_dense_difference():
    clients = {k: made(k + 1) for k in WEIGHTS}
    reduced, (error, norm) = measured(clients)
    exact = lost = 0.0
    for path in SIZES:
        want = sum(weight * product(clients[k], path) for k, weight in WEIGHTS.items())
        sent = product(reduced.mean, path)
        exact, lost = exact + float(want.square().sum()), lost + float((want - sent).square().sum())
    assert norm == pytest.approx(exact**0.5, rel=1e-6)
    assert error == pytest.approx((lost / exact) ** 0.5, rel=1e-6)
    assert error > 0.1


def test_clients_that_agree_lose_nothing():
    _, (error, norm) = measured(dict.fromkeys(WEIGHTS, made(1)))
    assert norm > 0
    assert error < 1e-6
