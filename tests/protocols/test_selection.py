"""The cohort's draw and the seeds: laws that hold for every seed and round."""

import hashlib
import itertools
import subprocess
import sys
from collections import Counter

import pytest

from fedunlearn.protocols.selection import select
from fedunlearn.seeds import seed_of, seeds_under

CLIENTS = tuple(range(10))


def draw(clients=CLIENTS, seed=0, round=1, count=3, forced=()):
    return select(clients, seed=seed, round=round, count=count, forced=forced)


def test_seed_of_is_the_top_of_a_sha256():
    """63 bits: the first 8 bytes of sha256("0/3/order"), without the lowest bit."""
    wanted = int(hashlib.sha256(b"0/3/order").hexdigest()[:16], 16) // 2
    assert seed_of(0, 3, "order") == wanted
    assert 0 <= wanted < 2**63


def test_seeds_differ_by_every_part():
    seeds = {
        seed_of(run, client, round, what)
        for run in range(3)
        for client in range(4)
        for round in range(5)
        for what in "ab"
    }
    assert len(seeds) == 3 * 4 * 5 * 2
    assert seed_of(1, 23) != seed_of(12, 3)


def test_another_process_draws_the_same_clients():
    """Python's own hash() differs from process to process; the draw must not."""
    code = "from fedunlearn.protocols.selection import select; print(select(range(10), seed=0, round=1, count=3, forced=(4,)))"
    for hash_seed in ("1", "2"):
        said = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, check=True
        )
        assert said.stdout.decode().strip() == str(draw(forced=(4,)))


@pytest.mark.parametrize(("count", "drawn"), [(0, 0), (1, 1), (3, 3), (9, 9), (10, 10), (11, 10), (100, 10)])
def test_how_many_are_drawn(count, drawn):
    """As many as asked for, all where there are fewer."""
    found = draw(count=count)
    assert len(found) == drawn
    assert list(found) == sorted(set(found))
    assert set(found) <= set(CLIENTS)


def test_as_many_as_there_are_takes_everyone_in_every_round():
    assert all(draw(seed=seed, round=round, count=10) == CLIENTS for seed in range(3) for round in range(1, 4))


def test_the_draw_is_deterministic_and_moves_with_seed_and_round():
    assert draw() == draw()
    assert len({draw(round=round) for round in range(1, 30)}) > 10
    assert len({draw(seed=seed) for seed in range(30)}) > 10


def test_the_order_in_which_clients_are_listed_does_not_matter():
    assert draw(CLIENTS[::-1]) == draw((3, 1, 4, 0, 5, 9, 2, 6, 8, 7)) == draw()


@pytest.mark.parametrize("missing", CLIENTS)
def test_one_client_s_absence_moves_no_other_s_draw(missing):
    """Three of ten and three of nine: who was drawn stays drawn; the place of the missing one goes to the next in line."""
    rest = tuple(client for client in CLIENTS if client != missing)
    for round in range(1, 20):
        before, after = (
            set(draw(round=round)),
            set(draw(rest, round=round)),
        )
        assert before - {missing} <= after
        assert len(after - before) == (missing in before)


def test_more_clients_drawn_contain_the_fewer():
    for round in range(1, 10):
        cohorts = [set(draw(round=round, count=n)) for n in range(1, 11)]
        assert all(small < large for small, large in itertools.pairwise(cohorts))


def test_every_client_has_its_turn():
    """300 rounds of 3 in 10: 90 turns a client are expected, with a standard deviation of 8."""
    turns = Counter(client for round in range(300) for client in draw(round=round))
    assert set(turns) == set(CLIENTS)
    assert all(50 < count < 130 for count in turns.values())


def test_where_fewer_are_there_all_are_drawn():
    """How many must count is min_clients' affair: the round is repeated, not the draw refused."""
    assert draw((0, 1)) == (0, 1)
    assert draw(()) == ()


class TestForced:
    def test_they_are_in_every_cohort_and_take_places_of_the_others(self):
        """Two forced of three places: one other is drawn, and it is the first in line of those who are not forced."""
        for round in range(1, 20):
            cohort = draw(round=round, forced=(2, 7))
            rest = tuple(client for client in CLIENTS if client not in (2, 7))
            assert cohort == tuple(sorted((2, 7, *draw(rest, round=round, count=1))))

    def test_more_forced_than_places_are_all_there_and_nobody_beside_them(self):
        for round in range(1, 20):
            assert draw(round=round, count=2, forced=(1, 3, 5, 8)) == (1, 3, 5, 8)
            assert draw(round=round, count=0, forced=(9,)) == (9,)

    def test_those_who_were_drawn_anyway_count_once(self):
        assert draw(count=10, forced=CLIENTS) == CLIENTS
        assert draw(forced=draw()) == draw()
        assert draw(forced=(draw()[0],)) == draw()

    def test_one_who_is_not_there_takes_no_place(self):
        assert draw(forced=(77,)) == draw()
        assert draw((0, 1, 2), count=2, forced=(2, 77)) in ((0, 2), (1, 2))

    def test_order_and_repetition_do_not_matter(self):
        assert draw(forced=(7, 2, 7)) == draw(forced=(2, 7))

    @pytest.mark.parametrize("missing", CLIENTS)
    def test_one_client_s_absence_moves_no_other_s_draw(self, missing):
        rest = tuple(client for client in CLIENTS if client != missing)
        for round in range(1, 20):
            before, after = (set(draw(there, round=round, forced=(2,))) for there in (CLIENTS, rest))
            assert before - {missing} <= after
            assert len(after - before) == (missing in before)

    def test_nobody_forced_is_the_plain_draw(self):
        assert all(draw(round=round, forced=()) == draw(round=round) for round in range(1, 20))


def test_many_seeds_under_the_same_parts_are_those_of_each_by_itself():
    seed = seeds_under("select", 3, 7)
    assert [seed(client) for client in (0, 12, "x")] == [seed_of("select", 3, 7, client) for client in (0, 12, "x")]


def test_the_draw_is_the_lowest_seeds():
    lowest = sorted(CLIENTS, key=lambda client: seed_of("select", 5, 2, client))[:4]
    assert draw(seed=5, round=2, count=4) == tuple(sorted(lowest))
