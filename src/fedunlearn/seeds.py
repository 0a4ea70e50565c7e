"""Seeds from names: every random draw of a run is a function of (run seed, purpose, client, round)."""

import hashlib


def seed_of(*parts: object) -> int:
    """Gives a seed in [0, 2**63) from the parts (run seed, client, round, purpose ...) by sha256: same parts, same seed, on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
