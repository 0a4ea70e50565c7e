"""FedAvg's and FedProx's steps on the server: by hand, and what they refuse."""

import pytest
import torch
from helpers_adapters import mean_of_clients

from fedunlearn.aggregation.base import ServerState
from fedunlearn.aggregation.fedavg import FedAvg
from fedunlearn.aggregation.fedprox import FedProx
from fedunlearn.errors import UserError

MEMBERS = [FedAvg(), FedProx(mu=0.5), FedProx(mu=0.0)]


def state(dtype=torch.float32):
    return ServerState(adapter={"A": torch.tensor([[1.0, 2.0]], dtype=dtype), "B": torch.zeros(2, dtype=dtype)})


@pytest.mark.parametrize("strategy", MEMBERS)
def test_two_rounds_by_hand(strategy):
    """x = mean: round 1 of (3, 4) at 1/4 and (7, 8) at 3/4 gives (6, 7); round 2 of (0, 1) alone gives (0, 1), without memory of 1."""
    clients = {
        0: {"A": torch.tensor([[3.0, 4.0]]), "B": torch.ones(2)},
        1: {"A": torch.tensor([[7.0, 8.0]]), "B": torch.ones(2)},
    }
    mean = mean_of_clients(["A", "B"], {0: 0.25, 1: 0.75}, lambda client, name: clients[client][name])
    first = strategy.step(state(), mean)
    second = strategy.step(first, {"A": torch.tensor([[0.0, 1.0]]).double(), "B": torch.ones(2).double()})
    assert first.adapter["A"].tolist() == [[6.0, 7.0]]
    assert second.adapter["A"].tolist() == [[0.0, 1.0]]
    assert (first.round, second.round) == (1, 2)
    assert first.adapter["B"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("strategy", MEMBERS)
def test_a_mean_equal_to_the_global_adapter_changes_nothing(strategy):
    before = {"w": torch.randn(100, generator=torch.Generator().manual_seed(0))}
    after = strategy.step(ServerState(adapter=before), {"w": before["w"].double()})
    assert torch.equal(after.adapter["w"], before["w"])


@pytest.mark.parametrize("strategy", MEMBERS)
def test_the_mean_itself_is_given_cast_once(strategy):
    """x + (w - x) in float32 is another number than w in some entries of this very draw."""
    x, w = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1))
    result = strategy.step(ServerState(adapter={"w": x}), {"w": w.double()}).adapter["w"]
    assert torch.equal(result, w)
    assert not torch.equal(x + (w - x), w)


@pytest.mark.parametrize("strategy", MEMBERS)
def test_inputs_are_not_modified_and_not_shared(strategy):
    start, mean = state(), {"A": torch.tensor([[6.0, 7.0]]).double(), "B": torch.ones(2).double()}
    result = strategy.step(start, mean)
    result.adapter["A"].add_(100)
    assert start.adapter["A"].tolist() == [[1.0, 2.0]]
    assert mean["A"].tolist() == [[6.0, 7.0]]
    assert start.round == 0


@pytest.mark.parametrize("strategy", MEMBERS)
def test_the_result_has_the_global_adapter_s_types_and_no_moments(strategy):
    """1 + 2^-9 rounds to 1 in bfloat16 and stays in float32; it is cast once, at the end."""
    mean = {"A": torch.tensor([[1 + 2**-9, 2.0]]).double(), "B": torch.zeros(2).double()}
    fine, coarse = strategy.step(state(), mean), strategy.step(state(torch.bfloat16), mean)
    assert fine.adapter["A"].dtype == torch.float32
    assert fine.adapter["A"][0, 0].item() == 1 + 2**-9
    assert coarse.adapter["A"].dtype == torch.bfloat16
    assert coarse.adapter["A"][0, 0].item() == 1.0
    assert dict(fine.moments) == {}


@pytest.mark.parametrize("strategy", MEMBERS)
@pytest.mark.parametrize(
    ("mean", "said"),
    [
        ({"A": torch.zeros(1, 2)}, "mean and global adapter differ in tensor 'B'"),
        ({"A": torch.zeros(1, 2), "B": torch.zeros(2), "C": torch.zeros(1)}, "differ in tensor 'C'"),
        (
            {"A": torch.zeros(1, 2), "B": torch.zeros(1, 2)},
            r"mean of 'B' has shape \(1, 2\), the global adapter \(2,\)",
        ),
    ],
)
def test_a_mean_of_other_names_or_shapes_is_refused(strategy, mean, said):
    with pytest.raises(ValueError, match=said):
        strategy.step(state(), mean)


def test_fedprox_on_the_server_is_fedavg_whatever_mu():
    generator = torch.Generator().manual_seed(3)
    start = ServerState(adapter={"w": torch.randn(50, generator=generator)})
    mean = {"w": torch.randn(50, generator=generator).double()}
    results = [strategy.step(start, mean).adapter["w"] for strategy in MEMBERS]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_only_fedprox_sends_clients_a_proximal_weight():
    assert FedAvg().client_mu == 0.0
    assert FedProx(mu=0.3).client_mu == 0.3
    assert FedProx(mu=0).client_mu == 0


def test_a_negative_mu_is_refused():
    with pytest.raises(
        UserError, match=r"^strategy\.mu=-0\.1 is refused: FedProx wants a number from 0 to 1e6; correct it"
    ):
        FedProx(mu=-0.1)
