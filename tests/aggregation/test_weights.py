"""Client weights and the weighted mean: by hand, and the laws that hold bit by bit."""

import dataclasses

import pytest
import torch
from helpers_adapters import mean_of_clients

from fedunlearn.aggregation.weights import client_weights
from fedunlearn.records.rounds import ClientUpdate


def update(client, owned=4, trained=4, tensors=None, norm=0.0):
    return ClientUpdate(
        client_id=client,
        round=1,
        run_id="run",
        tensors=tensors or {},
        num_examples=owned,
        num_trained=trained,
        num_steps=1,
        num_tokens=1,
        seconds=0.0,
        loss=0.0,
        update_norm=99.0,
        product_norm=norm,
    )


def reader(clients):
    """Reads from adapters by client id."""
    return lambda client, name: clients[client][name]


def adapters(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        k: {"A": torch.randn(3, 5, generator=generator), "B": torch.randn(4, generator=generator)} for k in range(count)
    }


def test_weights_by_hand():
    """Owned 1, 3 of 4: 1/4, 3/4. Trained 3, 1: 3/4, 1/4. Uniform: halves."""
    updates = [update(0, owned=1, trained=3), update(1, owned=3, trained=1)]
    assert client_weights(updates, "owned") == {0: 0.25, 1: 0.75}
    assert client_weights(updates, "trained") == {0: 0.75, 1: 0.25}
    assert client_weights(updates, "uniform") == {0: 0.5, 1: 0.5}


def test_weights_by_product_norm_by_hand():
    """||s B A|| of 1, 3, 4: 1/8, 3/8, 1/2, whatever the row counts and the norms of the updates; a client that holds nothing counts nothing."""
    updates = [update(2, owned=1, norm=4.0), update(0, owned=9, norm=1.0), update(1, norm=3.0), update(3, norm=0.0)]
    assert client_weights(updates, "product_norm") == {0: 0.125, 1: 0.375, 2: 0.5, 3: 0.0}


def test_where_no_client_holds_anything_norms_count_equally():
    weights = client_weights([update(k, owned=k + 1) for k in range(4)], "product_norm")
    assert weights == dict.fromkeys(range(4), 0.25)


@pytest.mark.parametrize("scale", [2, 7, 1000])
def test_weights_are_scale_free_bit_by_bit(scale):
    """k a / k b and a / b are one rational number, and division rounds it once."""
    small = [update(k, owned=k + 1) for k in range(7)]
    large = [update(k, owned=scale * (k + 1)) for k in range(7)]
    assert client_weights(small, "owned") == client_weights(large, "owned")
    assert sum(client_weights(small, "owned").values()) == pytest.approx(1.0, abs=1e-15)


def test_weights_stand_in_client_order_whoever_answers_first():
    weights = client_weights([update(9, 2), update(1, 3), update(4, 5)], "owned")
    assert list(weights) == [1, 4, 9]
    assert weights == {1: 0.3, 4: 0.5, 9: 0.2}


@pytest.mark.parametrize(
    ("updates", "kind"),
    [
        ([], "uniform"),
        ([], "product_norm"),
        ([update(0, owned=0), update(1, owned=0)], "owned"),
        ([update(0, trained=0)], "trained"),
    ],
)
def test_no_weight_at_all_is_refused(updates, kind):
    with pytest.raises(ValueError, match=rf"client weights \({kind}\) sum to 0"):
        client_weights(updates, kind)


def test_mean_by_hand():
    """1/4 (1, 2) + 3/4 (3, 6) = (2.5, 5), in float64."""
    clients = {0: {"w": torch.tensor([1.0, 2.0])}, 1: {"w": torch.tensor([3.0, 6.0])}}
    mean = mean_of_clients(["w"], {0: 0.25, 1: 0.75}, reader(clients))
    assert mean["w"].tolist() == [2.5, 5.0]
    assert mean["w"].dtype == torch.float64


def test_the_mean_of_factors_is_not_the_mean_of_products():
    """B A = 1 * 1 and 3 * 3: the mean of products is 5, the product of means 2 * 2 = 4; the mean works factor by factor."""
    clients = {k: {"A": torch.tensor([[v]]), "B": torch.tensor([[v]])} for k, v in ((0, 1.0), (1, 3.0))}
    mean = mean_of_clients(["A", "B"], {0: 0.5, 1: 0.5}, reader(clients))
    assert (mean["B"] @ mean["A"]).item() == 4.0


@pytest.mark.parametrize("count", [2, 3, 7, 10])
def test_equal_adapters_give_that_adapter(count):
    """Weights such as 1/7 do not sum to 1 exactly; in float64 that is lost when the mean is cast to float32."""
    one = adapters(1)[0]
    weights = client_weights([update(k, owned=k + 1) for k in range(count)], "owned")
    mean = mean_of_clients(list(one), weights, lambda _, name: one[name])
    for name, tensor in one.items():
        assert torch.equal(mean[name].float(), tensor)
        assert (mean[name] - tensor.double()).abs().max() <= 4e-16 * tensor.abs().max()


@pytest.mark.parametrize("kind", ["owned", "trained", "uniform", "product_norm"])
def test_one_client_gives_its_own_adapter_exactly(kind):
    clients = adapters(1)
    mean = mean_of_clients(["A", "B"], client_weights([update(0, 7, 5, norm=0.3)], kind), reader(clients))
    assert all(torch.equal(mean[name], clients[0][name].double()) for name in mean)


def test_client_order_does_not_matter_bit_by_bit():
    clients = adapters(6)
    updates = [update(k, owned=3 * k + 1) for k in clients]
    forth = mean_of_clients(["A", "B"], client_weights(updates, "owned"), reader(clients))
    weights = client_weights(updates[::-1], "owned")
    back = mean_of_clients(["B", "A"], dict(reversed(weights.items())), reader(dict(reversed(clients.items()))))
    assert all(torch.equal(forth[name], back[name]) for name in forth)


def test_sums_run_in_float64():
    """1e8 + 1 - 1e8 is 0 in float32; the mean of the three is 1/3."""
    clients = {k: {"w": torch.tensor([v])} for k, v in enumerate((1e8, 1.0, -1e8))}
    mean = mean_of_clients(["w"], client_weights([update(k) for k in range(3)], "uniform"), reader(clients))
    assert mean["w"].item() == pytest.approx(1 / 3, abs=1e-7)


def test_bfloat16_adapters_are_averaged_in_float64():
    """1 and 1 + 2^-7, neighbours in bfloat16: their mean 1 + 2^-8 is no bfloat16 number."""
    clients = {0: {"w": torch.tensor([1.0]).bfloat16()}, 1: {"w": torch.tensor([1 + 2**-7]).bfloat16()}}
    assert mean_of_clients(["w"], {0: 0.5, 1: 0.5}, reader(clients))["w"].item() == 1 + 2**-8


def test_equals_a_dense_float64_reference():
    clients, weights = adapters(5), {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.15, 4: 0.25}
    mean = mean_of_clients(["A", "B"], weights, reader(clients))
    for name in mean:
        dense = torch.stack([clients[k][name].double() for k in clients])
        wanted = torch.einsum("k,k...->...", torch.tensor(list(weights.values()), dtype=torch.float64), dense)
        assert (mean[name] - wanted).abs().max() < 1e-15


def test_float64_adapters_are_not_changed_in_place():
    """`double()` of a float64 tensor is the tensor itself: the sum must not run in the client's own memory."""
    clients = {k: {"w": torch.tensor([float(k)], dtype=torch.float64)} for k in (1, 2)}
    mean_of_clients(["w"], {1: 0.5, 2: 0.5}, reader(clients))
    assert [clients[k]["w"].item() for k in (1, 2)] == [1.0, 2.0]


def test_an_update_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError, match="num_examples"):
        update(0).num_examples = 10**12
