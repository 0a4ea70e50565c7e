"""The seeded draw of a round's cohort."""

import math
from collections.abc import Sequence

from fedunlearn.seeds import seed_of


def select(client_ids: Sequence[int], *, seed: int, round: int, fraction: float, at_least: int) -> tuple[int, ...]:
    """Draws ceil(fraction * K) clients, not fewer than `at_least`, in client-id order.

    Each client draws its own number from (seed, round, client) and the lowest win, so that one client's absence moves no
    other's draw. Raises ValueError where `at_least` exceeds the clients there are.
    """
    if at_least > len(client_ids):
        raise ValueError(f"{at_least} clients wanted, {len(client_ids)} there")
    count = max(at_least, math.ceil(fraction * len(client_ids) - 1e-9))
    drawn = sorted(client_ids, key=lambda client: (seed_of("select", seed, round, client), client))[:count]
    return tuple(sorted(drawn))
