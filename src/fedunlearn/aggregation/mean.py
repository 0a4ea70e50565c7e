"""The weighted mean of client adapters, tensor by tensor, in float64."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientUpdate

ReadTensor = Callable[[int, str], torch.Tensor]


Weighting = Literal["owned", "trained", "uniform", "product_norm"]


def client_weights(updates: Sequence[ClientUpdate], kind: Weighting) -> dict[int, float]:
    """Gives each client's share p_k (sum 1), in client-id order: by rows owned, rows trained this round, equal, or by ||s_k B_k A_k||.

    Raises ValueError where there is no update. Where every product is 0 they count equally.
    """
    ordered = sorted(updates, key=lambda update: update.client_id)
    raw = {update.client_id: _raw_weight(update, kind) for update in ordered}
    total = sum(raw.values())
    if kind == "product_norm" and total == 0 and raw:
        return {client: 1 / len(raw) for client in raw}
    if total <= 0:
        raise ValueError(f"client weights ({kind}) sum to {total}")
    return {client: weight / total for client, weight in raw.items()}


def _raw_weight(update: ClientUpdate, kind: Weighting) -> float:
    return {
        "owned": update.num_examples,
        "trained": update.num_trained,
        "uniform": 1,
        "product_norm": update.product_norm,
    }[kind]


def weighted_mean(names: Sequence[str], weights: Mapping[int, float], read: ReadTensor) -> Tensors:
    """Gives sum_k p_k x_k for every tensor, float64.

    weights: client id -> p_k (sum 1). read: gives one tensor of one client; it is asked tensor by tensor, clients in id order,
    so that memory is the result and one tensor, however many clients there are. K equal adapters give that adapter to 1 ulp of
    float64; one client gives its own adapter exactly.
    """
    clients = sorted(weights)
    return {name: _mean_of_one(name, clients, weights, read) for name in names}


def _mean_of_one(name: str, clients: Sequence[int], weights: Mapping[int, float], read: ReadTensor) -> torch.Tensor:
    total = read(clients[0], name).double() * weights[clients[0]]
    for client in clients[1:]:
        total.add_(read(client, name).double(), alpha=weights[client])
    return total
