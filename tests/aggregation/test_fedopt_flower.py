"""The server optimisers beside Flower 1.41's own classes: ten rounds, three clients with unequal num-examples, the same updates.

Flower works in float32 from the clients' float32 arrays, ours in float64: 5e-5 of the largest entry is allowed.
"""

from functools import partial

import numpy as np
import pytest
import torch
from flwr.serverapp import strategy as flower
from helpers_adapters import mean_of_clients
from helpers_flower import flower_rounds

from fedunlearn.aggregation.base import ServerState
from fedunlearn.aggregation.fedadagrad import FedAdagrad
from fedunlearn.aggregation.fedadam import FedAdam
from fedunlearn.aggregation.fedavg import FedAvg
from fedunlearn.aggregation.fedavgm import FedAvgM
from fedunlearn.aggregation.fedyogi import FedYogi

NUM_EXAMPLES = (5, 20, 75)
NUM_ROUNDS = 10
SHAPES = {"layer.lora_A": (4, 7), "layer.lora_B": (6, 4), "other.lora_A": (3,)}

# Ours, and how Flower's is made: it keeps its moments in itself.
PAIRS = {
    "FedAvg": (FedAvg(), partial(flower.FedAvg)),
    "FedAvgM": (
        FedAvgM(server_lr=0.7, momentum=0.9),
        partial(flower.FedAvgM, server_learning_rate=0.7, server_momentum=0.9),
    ),
    "FedAvgM, momentum 0": (FedAvgM(server_lr=0.7, momentum=0.0), partial(flower.FedAvgM, server_learning_rate=0.7)),
    "FedAdagrad": (FedAdagrad(server_lr=0.1, v_init=0.0), partial(flower.FedAdagrad, eta=0.1)),
    "FedAdam": (FedAdam(server_lr=0.1, v_init=0.0, bias_correction=True), partial(flower.FedAdam, eta=0.1)),
    "FedAdam, other betas": (
        FedAdam(server_lr=0.01, beta_1=0.5, beta_2=0.8, tau=0.1, v_init=0.0, bias_correction=True),
        partial(flower.FedAdam, eta=0.01, beta_1=0.5, beta_2=0.8, tau=0.1),
    ),
    "FedYogi": (FedYogi(server_lr=0.01, v_init=0.0), partial(flower.FedYogi, eta=0.01)),
}


def start():
    draw = np.random.default_rng(0)
    return {name: draw.normal(0, 0.5, shape).astype(np.float32) for name, shape in SHAPES.items()}


def moved(client, number, arrays):
    """A client's float32 adapter: the global one and an update of .02 to .04 until round 4, then of a twentieth.

    Clients agree in sign, so that D^2 is far above FedYogi's v at first and far below it later, never near it.
    """
    size = 0.04 if number <= 4 else 0.002
    common, own = np.random.default_rng(number), np.random.default_rng([number, client])
    update = {
        name: size * common.choice([-1, 1], array.shape) * own.uniform(0.5, 1, array.shape)
        for name, array in arrays.items()
    }
    return {name: (array + update[name]).astype(np.float32) for name, array in arrays.items()}


def our_rounds(strategy, num_rounds=NUM_ROUNDS):
    """Gives (state before, mean, state after) of each round."""
    state = ServerState(adapter={name: torch.from_numpy(array) for name, array in start().items()})
    weights = {client: count / sum(NUM_EXAMPLES) for client, count in enumerate(NUM_EXAMPLES)}
    steps = []
    for number in range(1, num_rounds + 1):
        arrays = {name: tensor.numpy() for name, tensor in state.adapter.items()}
        clients = [moved(client, number, arrays) for client in weights]
        mean = mean_of_clients(
            list(SHAPES), weights, lambda client, name, at=clients: torch.from_numpy(at[client][name])
        )
        after = strategy.step(state, mean)
        steps.append((state, mean, after))
        state = after
    return steps


def error(ours, theirs):
    """The largest difference of two sets of tensors, in parts of the largest entry."""
    largest = max(np.abs(array).max() for array in theirs.values())
    return max(np.abs(ours[name].double().numpy() - theirs[name]).max() for name in theirs) / largest


def errors(ours, theirs):
    """One a round."""
    results = flower_rounds(theirs(), start(), moved, NUM_EXAMPLES, NUM_ROUNDS)
    return [error(after.adapter, want) for (_, _, after), want in zip(our_rounds(ours), results, strict=True)]


@pytest.mark.parametrize("name", PAIRS)
def test_ten_rounds_are_flower_s(name, record_property):
    measured = errors(*PAIRS[name])
    record_property("largest_error", float(max(measured)))
    assert len(measured) == NUM_ROUNDS
    assert max(measured) < 5e-5


@pytest.mark.parametrize("name", ["FedAdagrad", "FedAdam", "FedYogi"])
def test_the_moments_are_flower_s_too(name):
    ours, theirs = PAIRS[name][0], PAIRS[name][1]()
    flower_rounds(theirs, start(), moved, NUM_EXAMPLES, NUM_ROUNDS)
    last = our_rounds(ours)[-1][2].moments
    assert error(last["v"], theirs.v_t) < 5e-5
    if "m" in last:
        assert error(last["m"], theirs.m_t) < 5e-5


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (FedAdagrad(server_lr=0.1), "FedAdagrad"),
        (FedYogi(server_lr=0.01), "FedYogi"),
        (FedAdam(server_lr=0.1, bias_correction=True), "FedAdam"),
        (FedAdam(server_lr=0.1, v_init=0.0), "FedAdam"),
        (FedAdagrad(server_lr=0.1, v_init=0.0, tau=9e-4), "FedAdagrad"),
    ],
)
def test_without_these_settings_flower_gives_other_numbers(ours, name):
    """v at tau^2, no bias correction, another tau: at least twice the tolerance of the test above, which therefore sees each."""
    assert max(errors(ours, PAIRS[name][1])) > 1e-4


def test_fedyogi_s_rounds_take_both_signs_and_stay_away_from_v_equal_to_d_squared():
    """Nearer than float32 can tell, the two sides would take different signs: here v and D^2 differ by half of the larger."""
    signs = set()
    for before, mean, _ in our_rounds(PAIRS["FedYogi"][0]):
        for name in SHAPES:
            square = (mean[name] - before.adapter[name].double()) ** 2
            v = before.moments.get("v", {}).get(name, torch.zeros(SHAPES[name])).double()
            assert ((v - square).abs() > 0.5 * torch.maximum(v, square)).all()
            signs |= set((v - square).sign().flatten().tolist())
    assert signs == {-1.0, 1.0}
