"""Shares of a whole as counts, each at least one."""

import random
from collections.abc import Sequence


def deal_by_shares(shares: Sequence[float], num_authors: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """Deals shuffled authors so that client k has about shares[k] of them: one each, the rest by largest remainder; sorted within a client."""
    counts = counts_of(shares, num_authors)
    authors = list(range(num_authors))
    random.Random(seed).shuffle(authors)
    ends = [sum(counts[: k + 1]) for k in range(len(counts))]
    return tuple(tuple(sorted(authors[end - count : end])) for count, end in zip(counts, ends, strict=True))


def counts_of(shares: Sequence[float], total: int) -> tuple[int, ...]:
    """Gives whole numbers from 1 that sum to `total` (at least as many as shares): what is left beside one each goes by largest remainder, ties to the first."""
    spare = total - len(shares)
    exact = [share / sum(shares) * spare for share in shares]
    counts = [int(value) for value in exact]
    by_rest = sorted(range(len(shares)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_rest[: spare - sum(counts)]:
        counts[k] += 1
    return tuple(count + 1 for count in counts)
