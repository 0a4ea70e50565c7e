"""The seeded draw of a round's cohort, and the seeds that clients train with."""

import hashlib
import math
from collections.abc import Sequence


def seed_of(*parts: object) -> int:
    """Gives a seed in [0, 2**63) from the parts (run seed, client, round, purpose ...) by sha256: same parts, same seed, on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
