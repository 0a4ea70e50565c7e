"""The server optimisers beside a slow transcription of the papers' algorithms: entry by entry, in Python's own floats.

The transcription rounds x, m and v to float32 once a round, as the state is kept. What is left is the order of float64
operations, 1e-16 of a number, which may turn one such rounding (6e-8): 1e-6 of the largest entry is allowed.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedunlearn.aggregation.base import ServerState
from fedunlearn.aggregation.fedadagrad import FedAdagrad
from fedunlearn.aggregation.fedadam import FedAdam
from fedunlearn.aggregation.fedavgm import FedAvgM
from fedunlearn.aggregation.fedyogi import FedYogi

NAMES = ("A", "B")
ENTRIES = st.floats(-2, 2, width=32, allow_subnormal=False)
LEARNING_RATES, BETAS, TAUS = st.floats(1e-3, 2), st.floats(0, 0.99), st.floats(1e-3, 1)
V_INITS = st.none() | st.floats(0, 2)

SETTINGS = {
    FedAvgM: st.fixed_dictionaries({"server_lr": LEARNING_RATES, "momentum": BETAS}),
    FedAdagrad: st.fixed_dictionaries({"server_lr": LEARNING_RATES, "tau": TAUS, "v_init": V_INITS}),
    FedYogi: st.fixed_dictionaries(
        {"server_lr": LEARNING_RATES, "beta_1": BETAS, "beta_2": BETAS, "tau": TAUS, "v_init": V_INITS}
    ),
    FedAdam: st.fixed_dictionaries(
        {
            "server_lr": LEARNING_RATES,
            "beta_1": BETAS,
            "beta_2": BETAS,
            "tau": TAUS,
            "v_init": V_INITS,
            "bias_correction": st.booleans(),
        }
    ),
}


def fedavgm_entry(x, m, v, d, t, server_lr, momentum):
    """Hsu et al.: v <- beta v + Delta, w <- w + v; here with a learning rate."""
    v = momentum * v + d
    return x + server_lr * v, m, v


def fedadagrad_entry(x, m, v, d, t, server_lr, tau, v_init):
    """Reddi et al., Algorithm 2 with beta_1 = 0: m_t = Delta_t, v_t = v_(t-1) + Delta_t^2."""
    v = v + d * d
    return x + server_lr * d / (math.sqrt(v) + tau), m, v


def fedyogi_entry(x, m, v, d, t, server_lr, beta_1, beta_2, tau, v_init):
    """Reddi et al., Algorithm 2: v_t = v_(t-1) - (1 - beta_2) Delta_t^2 sign(v_(t-1) - Delta_t^2)."""
    m = beta_1 * m + (1 - beta_1) * d
    if v > d * d:
        v = v - (1 - beta_2) * (d * d)
    elif v < d * d:
        v = v + (1 - beta_2) * (d * d)
    return x + server_lr * m / (math.sqrt(v) + tau), m, v


def fedadam_entry(x, m, v, d, t, server_lr, beta_1, beta_2, tau, v_init, bias_correction):
    """Reddi et al., Algorithm 2: v_t = beta_2 v_(t-1) + (1 - beta_2) Delta_t^2; Flower's correction where it is asked for."""
    m = beta_1 * m + (1 - beta_1) * d
    v = beta_2 * v + (1 - beta_2) * (d * d)
    if bias_correction:
        server_lr = server_lr * math.sqrt(1 - beta_2 ** (t + 1)) / (1 - beta_1 ** (t + 1))
    return x + server_lr * m / (math.sqrt(v) + tau), m, v


ENTRY = {FedAvgM: fedavgm_entry, FedAdagrad: fedadagrad_entry, FedYogi: fedyogi_entry, FedAdam: fedadam_entry}


@st.composite
def runs(draw, kind):
    """Hyperparameters, the start, and for each round the clients' mean of the tensors that it trains."""
    shapes = {name: draw(array_shapes(min_dims=0, max_dims=2, max_side=3)) for name in NAMES}
    start = {name: draw(arrays(np.float32, shape, elements=ENTRIES)) for name, shape in shapes.items()}
    active = st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True)
    means = [
        {name: draw(arrays(np.float64, shapes[name], elements=st.floats(-2, 2))) for name in draw(active)}
        for _ in range(draw(st.integers(1, 6)))
    ]
    return draw(SETTINGS[kind]), start, means


def reference(kind, hyperparameters, start, means):
    """Gives x, m and v by name after the last round; m and v of a tensor that was never trained are missing."""
    v_start = hyperparameters.get("v_init")
    if v_start is None:
        v_start = hyperparameters.get("tau", 0.0) ** 2
    x, m, v = {name: array.copy() for name, array in start.items()}, {}, {}
    for t, mean in enumerate(means, 1):
        for name in mean:
            m.setdefault(name, np.zeros_like(x[name]))
            first = name not in v
            v.setdefault(name, np.zeros_like(x[name]))
            for at in np.ndindex(x[name].shape):
                old_v = v_start if first else float(v[name][at])
                old_x = float(x[name][at])
                d = float(mean[name][at]) - old_x
                x[name][at], m[name][at], v[name][at] = ENTRY[kind](
                    old_x, float(m[name][at]), old_v, d, t, **hyperparameters
                )
    return x, m, v


def ours(kind, hyperparameters, start, means):
    """Steps the tensors that a round trains, as the round loop does: the others wait, with their moments."""
    strategy = kind(**hyperparameters)
    state = ServerState(adapter={name: torch.from_numpy(array) for name, array in start.items()})
    for mean in means:
        active = ServerState(
            adapter={name: state.adapter[name] for name in mean}, moments=state.moments, round=state.round
        )
        after = strategy.step(active, {name: torch.from_numpy(array) for name, array in mean.items()})
        state = ServerState(adapter={**state.adapter, **after.adapter}, moments=after.moments, round=after.round)
    return state


def assert_near(got, want):
    assert set(got) == set(want)
    for name, array in want.items():
        assert got[name].dtype == torch.float32
        assert tuple(got[name].shape) == array.shape
        assert np.abs(got[name].numpy() - array).max() <= 1e-6 * np.abs(array).max(), name


@pytest.mark.parametrize("kind", list(ENTRY))
def test_random_runs_are_the_paper_s(kind):
    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(runs(kind))
    def check(run):
        state = ours(kind, *run)
        x, m, v = reference(kind, *run)
        assert_near(state.adapter, x)
        assert_near(state.moments["v"], v)
        if "m" in state.moments:
            assert_near(state.moments["m"], m)

    check()
