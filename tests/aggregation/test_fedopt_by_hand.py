"""FedAvgM, FedAdagrad, FedAdam and FedYogi worked out by hand, the arithmetic in each docstring.

Tolerance 5e-7: half of the last figure written, and one rounding to float32 of numbers below 4 (FedAvgM's: exact to float32).
"""

import pytest
import torch
from helpers_adapters import mean_of_clients

from fedunlearn.aggregation.base import ServerState
from fedunlearn.aggregation.fedadagrad import FedAdagrad
from fedunlearn.aggregation.fedadam import FedAdam
from fedunlearn.aggregation.fedavgm import FedAvgM
from fedunlearn.aggregation.fedyogi import FedYogi


def near(*values):
    return pytest.approx(list(values), abs=5e-7, rel=0)


def rounds(strategy, x, deltas):
    """The states after each round: the clients' mean is the global adapter plus one of `deltas`."""
    states, state = [], ServerState(adapter={"w": torch.tensor(x)})
    for delta in deltas:
        mean = {"w": state.adapter["w"].double() + torch.tensor(delta, dtype=torch.float64)}
        state = strategy.step(state, mean)
        states.append(state)
    return states


def adapters(states):
    return [state.adapter["w"].tolist() for state in states]


def moments(states, name):
    return [state.moments[name]["w"].tolist() for state in states]


def test_fedavgm_three_rounds():
    """momentum 0.9, server_lr 0.5, x = (1, 2).

    D = (5, 1):   v = (5, 1);                              x = (1 + 2.5, 2 + .5)         = (3.5, 2.5)
    D = (1, -2):  v = (.9 5 + 1, .9 1 - 2) = (5.5, -1.1);  x = (3.5 + 2.75, 2.5 - .55)   = (6.25, 1.95)
    D = (-2, 2):  v = (4.95 - 2, -.99 + 2) = (2.95, 1.01); x = (6.25 + 1.475, 1.95 + .505) = (7.725, 2.455)
    """
    states = rounds(FedAvgM(server_lr=0.5, momentum=0.9), [1.0, 2.0], [[5.0, 1.0], [1.0, -2.0], [-2.0, 2.0]])
    assert moments(states, "v") == [near(5, 1), near(5.5, -1.1), near(2.95, 1.01)]
    assert adapters(states) == [near(3.5, 2.5), near(6.25, 1.95), near(7.725, 2.455)]
    assert [state.round for state in states] == [1, 2, 3]


def test_fedavgm_by_default_is_hsu_s():
    """server_lr 1, momentum .9: D = 1 twice moves x by 1 and then by .9 + 1 = 1.9."""
    assert adapters(rounds(FedAvgM(), [0.0], [[1.0], [1.0]])) == [near(1), near(2.9)]


def test_fedadam_three_rounds():
    """server_lr 2.1, beta_1 .9, beta_2 .75, tau 2, so that v starts at 4; x = (1, 2).

    D = (2, -5.5): m = .1 D = (.2, -.55);  v = .75 4 + .25 (4, 30.25) = (4, 10.5625), roots (2, 3.25)
                   x = (1 + .42 / 4, 2 - 1.155 / 5.25) = (1.105, 1.78)
    D = (-2, 1):   m = (.18 - .2, -.495 + .1) = (-.02, -.395);  v = (3 + 1, 7.921875 + .25) = (4, 8.171875), roots (2, 2.8586492)
                   x = (1.105 - .042 / 4, 1.78 - .8295 / 4.8586492) = (1.0945, 1.6092735)
    D = (4, -3):   m = (-.018 + .4, -.3555 - .3) = (.382, -.6555);  v = (3 + 4, 6.12890625 + 2.25) = (7, 8.37890625),
                   roots (2.6457513, 2.8946340);  x = (1.0945 + .8022 / 4.6457513, 1.6092735 - 1.37655 / 4.8946340) = (1.2671739, 1.3280370)
    """
    strategy = FedAdam(server_lr=2.1, beta_1=0.9, beta_2=0.75, tau=2.0)
    states = rounds(strategy, [1.0, 2.0], [[2.0, -5.5], [-2.0, 1.0], [4.0, -3.0]])
    assert moments(states, "m") == [near(0.2, -0.55), near(-0.02, -0.395), near(0.382, -0.6555)]
    assert moments(states, "v") == [near(4, 10.5625), near(4, 8.171875), near(7, 8.37890625)]
    assert adapters(states) == [near(1.105, 1.78), near(1.0945, 1.6092735), near(1.2671739, 1.3280370)]


def test_fedadam_by_default_is_reddi_s():
    """server_lr 1e-3, beta_1 .9, beta_2 .99, tau 1e-3, v starts at 1e-6; D = (.01, 0).

    m = (1e-3, 0); v = .99e-6 + .01 1e-4 = 1.99e-6, root 1.4106736e-3; x = 1e-3 1e-3 / 2.4106736e-3 = 4.148218e-4.
    """
    (state,) = rounds(FedAdam(), [0.0, 0.0], [[0.01, 0.0]])
    assert state.adapter["w"].tolist() == pytest.approx([4.148218e-4, 0.0], abs=1e-10)
    assert state.moments["v"]["w"].tolist() == pytest.approx([1.99e-6, 0.99e-6], rel=1e-7)


def test_fedadam_with_bias_correction():
    """server_lr 1, beta_1 .5, beta_2 .75, tau 1, v from 0, x = 0, D = 2 and 2; t + 1 is 2 and 3.

    t = 1: sqrt(1 - .5625) / (1 - .25) = .6614378 / .75 = .8819171;  m = 1, v = 1;  x = .8819171 1 / 2 = .4409586
    t = 2: sqrt(1 - .421875) / (1 - .125) = .7603453 / .875 = .8689660;  m = 1.5, v = 1.75, root 1.3228757
           x = .4409586 + 1.3034490 / 2.3228757 = 1.0020943
    """
    strategy = FedAdam(server_lr=1.0, beta_1=0.5, beta_2=0.75, tau=1.0, v_init=0.0, bias_correction=True)
    states = rounds(strategy, [0.0], [[2.0], [2.0]])
    assert moments(states, "m") == [near(1), near(1.5)]
    assert moments(states, "v") == [near(1), near(1.75)]
    assert adapters(states) == [near(0.4409586), near(1.0020943)]


def test_bias_correction_counts_the_server_s_rounds_not_the_steps():
    """The state of round 4 without moments: this is round 5, t + 1 = 6, beta_1 .5, beta_2 .75, tau 1, v from 0, D = 2.

    sqrt(1 - .1779785) / (1 - .015625) = .9066540 / .984375 = .9210453;  x = .9210453 1 / 2 = .4605226.
    """
    strategy = FedAdam(server_lr=1.0, beta_1=0.5, beta_2=0.75, tau=1.0, v_init=0.0, bias_correction=True)
    state = strategy.step(ServerState(adapter={"w": torch.zeros(1)}, round=4), {"w": torch.tensor([2.0]).double()})
    assert state.adapter["w"].tolist() == near(0.4605226)
    assert state.round == 5


def test_fedyogi_three_rounds():
    """server_lr 1, beta_1 .9, beta_2 .75, tau 2, so that v starts at 4; x = (1, 2, 3).

    D = (1, 3, 2), D^2 = (1, 9, 4), signs of v - D^2 (+, -, 0): v = (4 - .25, 4 + 2.25, 4) = (3.75, 6.25, 4), roots (1.9364917, 2.5, 2)
        m = (.1, .3, .2);  x = (1 + .1 / 3.9364917, 2 + .3 / 4.5, 3 + .2 / 4) = (1.0254033, 2.0666667, 3.05)
    D = (-3, 1, 0), D^2 = (9, 1, 0), signs (-, +, +): v = (3.75 + 2.25, 6.25 - .25, 4) = (6, 6, 4), root of 6: 2.4494897
        m = (.09 - .3, .27 + .1, .18) = (-.21, .37, .18)
        x = (1.0254033 - .21 / 4.4494897, 2.0666667 + .37 / 4.4494897, 3.05 + .18 / 4) = (.9782069, 2.1498223, 3.095)
    D = (2, -4, 1), D^2 = (4, 16, 1), signs (+, -, +): v = (6 - 1, 6 + 4, 4 - .25) = (5, 10, 3.75), roots (2.2360680, 3.1622777, 1.9364917)
        m = (-.189 + .2, .333 - .4, .162 + .1) = (.011, -.067, .262)
        x = (.9782069 + .011 / 4.2360680, 2.1498223 - .067 / 5.1622777, 3.095 + .262 / 3.9364917) = (.9808037, 2.1368435, 3.1615567)
    """
    strategy = FedYogi(server_lr=1.0, beta_1=0.9, beta_2=0.75, tau=2.0)
    states = rounds(strategy, [1.0, 2.0, 3.0], [[1.0, 3.0, 2.0], [-3.0, 1.0, 0.0], [2.0, -4.0, 1.0]])
    assert moments(states, "m") == [near(0.1, 0.3, 0.2), near(-0.21, 0.37, 0.18), near(0.011, -0.067, 0.262)]
    assert moments(states, "v") == [near(3.75, 6.25, 4), near(6, 6, 4), near(5, 10, 3.75)]
    assert adapters(states) == [
        near(1.0254033, 2.0666667, 3.05),
        near(0.9782069, 2.1498223, 3.095),
        near(0.9808037, 2.1368435, 3.1615567),
    ]


def test_fedyogi_by_default_is_reddi_s():
    """server_lr 1e-3, beta_1 .9, beta_2 .99, tau 1e-3, v starts at 1e-6; D = (.01, 0).

    m = (1e-3, 0); v = 1e-6 + .01 1e-4 = 2e-6, root 1.4142136e-3; x = 1e-3 1e-3 / 2.4142136e-3 = 4.142136e-4. Where D = 0, v stays.
    """
    (state,) = rounds(FedYogi(), [0.0, 0.0], [[0.01, 0.0]])
    assert state.adapter["w"].tolist() == pytest.approx([4.142136e-4, 0.0], abs=1e-10)
    assert state.moments["v"]["w"].tolist() == pytest.approx([2e-6, 1e-6], rel=1e-7)


def test_fedadagrad_three_rounds():
    """server_lr .9, tau 2, so that v starts at 4; x = (1, 2).

    D = (1.5, -3.75): v = (4 + 2.25, 4 + 14.0625) = (6.25, 18.0625), roots (2.5, 4.25)
                      x = (1 + 1.35 / 4.5, 2 - 3.375 / 6.25) = (1.3, 1.46)
    D = (-2, 1):      v = (10.25, 19.0625), roots (3.2015621, 4.3660623)
                      x = (1.3 - 1.8 / 5.2015621, 1.46 + .9 / 6.3660623) = (.9539501, 1.6013747)
    D = (3, 0):       v = (19.25, 19.0625), root 4.3874822;  x = (.9539501 + 2.7 / 6.3874822, 1.6013747) = (1.3766519, 1.6013747)
    No momentum: where D = 0 the entry rests.
    """
    states = rounds(FedAdagrad(server_lr=0.9, tau=2.0), [1.0, 2.0], [[1.5, -3.75], [-2.0, 1.0], [3.0, 0.0]])
    assert moments(states, "v") == [near(6.25, 18.0625), near(10.25, 19.0625), near(19.25, 19.0625)]
    assert adapters(states) == [near(1.3, 1.46), near(0.9539501, 1.6013747), near(1.3766519, 1.6013747)]


def test_fedadagrad_by_default_is_reddi_s():
    """server_lr 1e-3, tau 1e-3, v starts at 1e-6; D = .01: v = 1.01e-4, root 1.00498756e-2; x = 1e-5 / 1.10498756e-2 = 9.0498756e-4."""
    (state,) = rounds(FedAdagrad(), [0.0], [[0.01]])
    assert state.adapter["w"].tolist() == pytest.approx([9.0498756e-4], abs=1e-10)


@pytest.mark.parametrize("strategy", [FedAdam, FedYogi, FedAdagrad])
def test_v_init_says_where_v_starts(strategy):
    """tau 2 alone starts v at 4; v_init 9 at 9, v_init 0 at 0. With D = 0 FedAdam's decays to .99 of it, the others' stay."""
    kept = 0.99 if strategy is FedAdam else 1.0
    for v_init, start in ((None, 4.0), (9.0, 9.0), (0.0, 0.0)):
        (state,) = rounds(strategy(tau=2.0, v_init=v_init), [1.0], [[0.0]])
        assert state.moments["v"]["w"].tolist() == near(kept * start)
        assert state.adapter["w"].tolist() == [1.0]


ONE_ROUND = [FedAvgM(server_lr=0.5), FedAdagrad(server_lr=1.0, tau=1.0)] + [
    kind(server_lr=1.0, beta_1=0.9, beta_2=0.75, tau=1.0) for kind in (FedAdam, FedYogi)
]


@pytest.mark.parametrize(
    ("strategy", "want"),
    zip(ONE_ROUND, [(1.5, 4), (1.4142136, 4.3819660), (1.05, 4.9138998), (1.05, 4.9171573)], strict=True),
)
def test_unequal_weights(strategy, want):
    """x = (1, 5); clients (1, 5) at 3/4 and (5, -3) at 1/4: mean (2, 3), D = (1, -2). Squared is this mean, (1, 4); the mean of
    the squares were (4, 16).

    FedAvgM:    x = (1 + .5, 5 - 1)
    FedAdagrad: v = 1 + (1, 4) = (2, 5); x = (1 + 1 / 2.4142136, 5 - 2 / 3.2360680) = (1.4142136, 4.3819660)
    FedAdam:    v = .75 + .25 (1, 4) = (1, 1.75); m = (.1, -.2); x = (1 + .1 / 2, 5 - .2 / 2.3228757) = (1.05, 4.9138998)
    FedYogi:    v = (1, 1 + 1) for 1 - D^2 = (0, -3); x = (1 + .1 / 2, 5 - .2 / 2.4142136) = (1.05, 4.9171573)
    """
    clients = {0: torch.tensor([1.0, 5.0]), 1: torch.tensor([5.0, -3.0])}
    mean = mean_of_clients(["w"], {0: 0.75, 1: 0.25}, lambda client, _: clients[client])
    state = strategy.step(ServerState(adapter={"w": torch.tensor([1.0, 5.0])}), mean)
    assert state.adapter["w"].tolist() == near(*want)


@pytest.mark.parametrize(
    ("strategy", "want"),
    zip(ONE_ROUND, [(2, 1.5), (1.6180340, 1.5857864), (1.0861002, 1.95), (1.0828427, 1.95)], strict=True),
)
def test_one_client(strategy, want):
    """x = (1, 2), the only client (3, 1): D = (2, -1).

    FedAvgM:    x = (1 + 1, 2 - .5)
    FedAdagrad: v = (5, 2); x = (1 + 2 / 3.2360680, 2 - 1 / 2.4142136) = (1.6180340, 1.5857864)
    FedAdam:    v = .75 + .25 (4, 1) = (1.75, 1); m = (.2, -.1); x = (1 + .2 / 2.3228757, 2 - .1 / 2) = (1.0861002, 1.95)
    FedYogi:    v = (1 + 1, 1) for 1 - D^2 = (-3, 0); x = (1 + .2 / 2.4142136, 2 - .1 / 2) = (1.0828427, 1.95)
    """
    mean = mean_of_clients(["w"], {3: 1.0}, lambda client, name: torch.tensor([3.0, 1.0]))
    state = strategy.step(ServerState(adapter={"w": torch.tensor([1.0, 2.0])}), mean)
    assert state.adapter["w"].tolist() == near(*want)


def test_one_client_under_fedavgm_s_defaults_gives_its_adapter_in_the_first_round():
    """x + 1 (w - x) in float64, rounded to float32, is w."""
    x, w = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(FedAvgM().step(ServerState(adapter={"w": x}), {"w": w.double()}).adapter["w"], w)
