"""What each client counts for in the mean."""

from collections.abc import Sequence

from fedunlearn.aggregation.names import ClientWeights
from fedunlearn.records.rounds import ClientUpdate


def client_weights(updates: Sequence[ClientUpdate], kind: ClientWeights) -> dict[int, float]:
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


def _raw_weight(update: ClientUpdate, kind: ClientWeights) -> float:
    return {
        "owned": update.num_examples,
        "trained": update.num_trained,
        "uniform": 1,
        "product_norm": update.product_norm,
    }[kind]
