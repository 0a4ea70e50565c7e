"""The seeded draw of a round's cohort."""

from collections.abc import Collection

from fedunlearn.seeds import seed_of


def select(
    client_ids: Collection[int], *, seed: int, round: int, count: int, forced: Collection[int] = ()
) -> tuple[int, ...]:
    """Draws `count` clients, or all where there are fewer, and adds the forced ones that were not drawn; in client-id order.

    Each client draws its own number from (seed, round, client) and the lowest win, so that one client's absence moves no
    other's draw: whoever comes next takes its place. Forced clients take places of those drawn before any is added.
    """
    owners = sorted(set(forced) & set(client_ids))
    others = sorted(set(client_ids) - set(owners), key=lambda client: (seed_of("select", seed, round, client), client))
    return tuple(sorted([*owners, *others[: max(count - len(owners), 0)]]))
