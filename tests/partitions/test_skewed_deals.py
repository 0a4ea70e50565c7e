"""Dirichlet and quantity skew: the laws of a deal, by hand, at the ends of their ranges, and that the parameter does what it says."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedunlearn.errors import UserError
from fedunlearn.partitions.dirichlet import Dirichlet
from fedunlearn.partitions.quantity_skew import QuantitySkew
from fedunlearn.partitions.shares import counts_of

SCHEMES = [
    *(Dirichlet(alpha=alpha, seed=seed) for alpha in (1e-3, 0.1, 0.5, 10.0, 1e6) for seed in (0, 7)),
    *(QuantitySkew(exponent=exponent, seed=seed) for exponent in (0, 1.0, 3.0, 10.0) for seed in (0, 7)),
]
SIZES = [(200, 1), (200, 3), (200, 10), (200, 199), (200, 200), (20, 7), (1, 1)]


def sizes(scheme, authors=200, clients=10):
    return [len(owned) for owned in scheme.deal(authors, clients)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("authors", "clients"), SIZES)
class TestLaws:
    def test_every_author_has_one_owner_and_every_client_an_author(self, scheme, authors, clients):
        dealt = scheme.deal(authors, clients)
        assert len(dealt) == clients
        assert all(dealt)
        assert sorted(author for owned in dealt for author in owned) == list(range(authors))
        assert all(list(owned) == sorted(owned) for owned in dealt)

    def test_the_global_generator_neither_moves_the_deal_nor_is_moved(self, scheme, authors, clients):
        random.seed(1)
        first, state = scheme.deal(authors, clients), random.getstate()
        random.seed(2)
        assert scheme.deal(authors, clients) == first
        random.seed(1)
        assert random.getstate() == state


@pytest.mark.parametrize("kind", [Dirichlet, QuantitySkew])
def test_another_seed_is_another_deal(kind):
    assert len({kind(seed=seed).deal(200, 10) for seed in range(20)}) == 20


def test_quantity_skew_by_hand():
    """Zipf over 3 clients: shares 1, 1/2, 1/3 of 11/6. 20 authors: one each, 17 spare as 9.27, 4.64, 3.09; whole parts 9, 4, 3 leave one, which goes to the
    largest rest, 0.64: 9, 5, 3, so 10, 6, 4 with the one each."""
    assert sizes(QuantitySkew(exponent=1.0), 20, 3) == [10, 6, 4]


def test_exponent_0_is_even_and_10_leaves_one_each_to_all_but_the_first():
    assert sizes(QuantitySkew(exponent=0), 200, 10) == [20] * 10
    assert sizes(QuantitySkew(exponent=10.0), 200, 10) == [191, *[1] * 9]


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_exponent_gives_the_first_more_and_later_ones_never_more_than_earlier(seed):
    firsts = []
    for exponent in (0, 0.5, 1.0, 2.0, 5.0):
        found = sizes(QuantitySkew(exponent=exponent, seed=seed))
        assert found == sorted(found, reverse=True)
        firsts.append(found[0])
    assert firsts == sorted(set(firsts))


def test_a_small_alpha_leaves_nearly_all_to_one_and_a_large_one_the_same_to_all():
    """The largest of 10 shares of 200 authors, over 40 seeds: at 0.001 all but the one each (191) in nearly all of them, at 1e6 always 20 or so."""
    largest = [max(sizes(Dirichlet(alpha=1e-3, seed=seed))) for seed in range(40)]
    assert largest.count(191) >= 35
    assert all(set(sizes(Dirichlet(alpha=1e6, seed=seed))) <= {19, 20, 21} for seed in range(40))


def test_the_largest_share_falls_as_alpha_grows():
    means = [sum(max(sizes(Dirichlet(alpha=a, seed=s))) for s in range(40)) / 40 for a in (0.05, 0.5, 5.0, 500.0)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 2 * means[2]


def test_dirichlet_lets_any_client_be_the_large_one():
    assert len({max(range(10), key=sizes(Dirichlet(alpha=0.1, seed=seed)).__getitem__) for seed in range(60)}) >= 8


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-300, 1e6), min_size=1, max_size=12), st.integers(0, 100))
def test_counts_are_whole_at_least_one_sum_up_and_stay_within_one_of_the_share(shares, spare):
    counts = counts_of(shares, spare + len(shares))
    assert sum(counts) == spare + len(shares)
    assert min(counts) >= 1
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - 1 - share / sum(shares) * spare) < 1 + 1e-9


@pytest.mark.parametrize("alpha", [0, -1.0, 1e-4, 1e7, float("nan"), float("inf")])
def test_an_alpha_that_is_none_is_refused(alpha):
    with pytest.raises(
        UserError, match=rf"partition\.scheme\.alpha={alpha} of Dirichlet must lie between 0.001 and 1e6"
    ):
        Dirichlet(alpha=alpha)


@pytest.mark.parametrize("exponent", [-0.5, 11, float("nan"), float("inf")])
def test_an_exponent_that_is_none_is_refused(exponent):
    with pytest.raises(UserError, match=rf"partition\.scheme\.exponent={exponent} of QuantitySkew must lie between 0"):
        QuantitySkew(exponent=exponent)
