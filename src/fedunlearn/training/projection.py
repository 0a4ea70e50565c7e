"""Projection onto a ball around where the round began, in product space."""

import math
from collections.abc import Mapping

import torch

from fedunlearn.aggregation.factors import Factors, modules_of, plain_of
from fedunlearn.aggregation.product import LowRank, inner_products
from fedunlearn.records.adapter import Tensors

HALVINGS = 60


def pull_inside(now: Tensors, start: Tensors, scales: Mapping[str, float], radius: float) -> None:
    """Scales the way of all factors from `start` by one t <= 1, in place, so that the product has moved by `radius` at most.

    now: the adapter's live tensors; start: as the round began, same device; scales: s by module name. With A = A0 + t dA and B = B0 + t dB the update is
    t P + t^2 Q, P = s (B0 dA + dB A0), Q = s dB dA (a plain tensor moves by t dT), and grows with t up to where bisection starts from, or is small enough.
    """
    inner = torch.zeros(2, 2, dtype=torch.float64)
    for module in modules_of(start):
        scale = scales[module.name]
        old = Factors(start[module.b], start[module.a], scale).double
        b, a = now[module.b].double() - old.b, now[module.a].double() - old.a
        linear = LowRank(torch.cat([old.b, b], 1) * scale, torch.cat([a, old.a], 0))
        inner += inner_products([linear, LowRank(b * scale, a)]).cpu()
    inner[0, 0] += sum(float((now[name] - start[name]).double().square().sum()) for name in plain_of(start))
    share = _largest_share(inner, radius)
    if share < 1:
        with torch.no_grad():
            for name, tensor in now.items():
                tensor.copy_(start[name] + share * (tensor - start[name]))


def _largest_share(inner: torch.Tensor, radius: float) -> float:
    """Gives a t in [0, 1] with ||t P + t^2 Q|| <= radius, the largest that bisection finds. inner: Gram matrix of P and Q."""
    p, pq, q = float(inner[0, 0]), float(inner[0, 1]), float(inner[1, 1])

    def length(t: float) -> float:
        return math.sqrt(max(t * t * (p + 2 * t * pq + t * t * q), 0.0))

    if length(1.0) <= radius:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if length(middle) <= radius else (low, middle)
    return low
