"""The seeded draw of a round's cohort."""

from collections.abc import Collection
from heapq import nsmallest

from fedunlearn.seeds import seeds_under


def select(
    client_ids: Collection[int], *, seed: int, round: int, count: int, forced: Collection[int] = ()
) -> tuple[int, ...]:
    """Draws `count` clients, or all where there are fewer, and adds the forced ones that were not drawn; in client-id order.

    Each client draws its own number from (seed, round, client) and the lowest win, so that one client's absence moves no
    other's draw: whoever comes next takes its place. Forced clients take places of those drawn before any is added.
    """
    owners = sorted(set(forced) & set(client_ids))
    number = seeds_under("select", seed, round)
    others = set(client_ids).difference(owners)
    drawn = nsmallest(max(count - len(owners), 0), others, key=lambda client: (number(client), client))
    return tuple(sorted([*owners, *drawn]))
