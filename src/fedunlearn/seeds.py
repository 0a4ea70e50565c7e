"""Seeds from names: every random draw of a run is a function of (run seed, purpose, client, round)."""

import hashlib
from collections.abc import Callable


def seed_of(*parts: object) -> int:
    """Gives a seed in [0, 2**63) from the parts (run seed, client, round, purpose ...) by sha256: same parts, same seed, on every machine."""
    return _number(hashlib.sha256("/".join(map(str, parts)).encode()).digest())


def seeds_under(*parts: object) -> Callable[[object], int]:
    """Gives the function x -> seed_of(*parts, x), for many x: the parts that they share are hashed once."""
    begun = hashlib.sha256("".join(f"{part}/" for part in parts).encode())

    def seed(last: object) -> int:
        one = begun.copy()
        one.update(str(last).encode())
        return _number(one.digest())

    return seed


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big") >> 1
