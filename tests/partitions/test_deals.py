"""Authors to clients: by hand, on TOFU's 200 authors, and the laws of the interface."""

import random

import pytest

from fedunlearn.partitions.by_author import ByAuthor
from fedunlearn.partitions.iid import Iid
from fedunlearn.partitions.round_robin import RoundRobin

SCHEMES = [ByAuthor(), RoundRobin(), Iid(), Iid(seed=5)]
SIZES = [(200, 1), (200, 3), (200, 10), (200, 20), (200, 100), (200, 200), (20, 7), (1, 1)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("authors", "clients"), SIZES)
class TestLaws:
    def test_every_author_has_one_owner_and_every_client_an_author(self, scheme, authors, clients):
        dealt = scheme.deal(authors, clients)
        assert len(dealt) == clients
        assert sorted(author for owned in dealt for author in owned) == list(range(authors))
        assert all(dealt)

    def test_sizes_differ_by_one_at_most(self, scheme, authors, clients):
        sizes = [len(owned) for owned in scheme.deal(authors, clients)]
        assert max(sizes) - min(sizes) <= 1

    def test_the_same_arguments_give_the_same_deal(self, scheme, authors, clients):
        random.seed(authors)
        assert scheme.deal(authors, clients) == scheme.deal(authors, clients)


def test_by_author_by_hand():
    """7 authors, 3 clients: blocks of 3, 2, 2, the larger first."""
    assert ByAuthor().deal(7, 3) == ((0, 1, 2), (3, 4), (5, 6))


def test_round_robin_by_hand():
    assert RoundRobin().deal(7, 3) == ((0, 3, 6), (1, 4), (2, 5))


@pytest.mark.parametrize(("clients", "percent"), [(10, 10), (20, 5), (100, 1)])
def test_tofu_s_forget_splits_are_exactly_the_last_client(clients, percent):
    """forget10, 05 and 01 are the last 20, 10 and 2 of 200 authors: what client 9 of 10, 19 of 20, 99 of 100 owns."""
    dealt = ByAuthor().deal(200, clients)
    assert dealt[-1] == tuple(range(200 - 2 * percent, 200))
    assert all(max(owned) < 200 - 2 * percent for owned in dealt[:-1])


def test_four_clients_leave_forget10_to_the_last_with_authors_to_keep():
    assert ByAuthor().deal(200, 4)[3] == tuple(range(150, 200))


def test_round_robin_gives_forget10_to_every_client():
    """The last 20 authors over 10 clients: two each."""
    assert [sum(author >= 180 for author in owned) for owned in RoundRobin().deal(200, 10)] == [2] * 10


def test_iid_moves_with_its_seed_and_not_with_the_global_one():
    random.seed(1)
    first = Iid(seed=3).deal(200, 10)
    state = random.getstate()
    random.seed(2)
    assert Iid(seed=3).deal(200, 10) == first
    assert Iid(seed=4).deal(200, 10) != first
    random.seed(1)
    assert random.getstate() == state


def test_iid_does_not_follow_the_order_of_authors():
    dealt = Iid(seed=0).deal(200, 10)
    assert sum(author >= 180 for author in dealt[-1]) < 10
    assert all(list(owned) == sorted(owned) for owned in dealt)


def test_one_client_owns_everything_in_order():
    assert all(scheme.deal(12, 1) == (tuple(range(12)),) for scheme in SCHEMES)
