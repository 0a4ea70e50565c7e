"""The cohort's draw and the seeds: laws that hold for every seed and round."""

import hashlib
import itertools
import subprocess
import sys
from collections import Counter

import pytest

from fedunlearn.protocols.selection import select
from fedunlearn.seeds import seed_of

CLIENTS = tuple(range(10))


def draw(clients=CLIENTS, seed=0, round=1, fraction=0.3, at_least=1):
    return select(clients, seed=seed, round=round, fraction=fraction, at_least=at_least)


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
    code = "from fedunlearn.protocols.selection import select; print(select(range(10), seed=0, round=1, fraction=0.3, at_least=1))"
    for hash_seed in ("1", "2"):
        said = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, check=True
        )
        assert said.stdout.decode().strip() == str(draw())


@pytest.mark.parametrize(
    ("fraction", "at_least", "count"),
    [(1.0, 1, 10), (0.3, 1, 3), (0.31, 1, 4), (0.1, 1, 1), (0.01, 1, 1), (0.1, 4, 4), (0.5, 4, 5), (0.5, 10, 10)],
)
def test_how_many_are_drawn(fraction, at_least, count):
    """ceil(fraction x 10), not fewer than at_least."""
    drawn = draw(fraction=fraction, at_least=at_least)
    assert len(drawn) == count
    assert list(drawn) == sorted(set(drawn))
    assert set(drawn) <= set(CLIENTS)


def test_a_tenth_of_many_clients_is_not_rounded_up_by_float_noise():
    """0.07 x 100 = 7.000000000000001 in floating point: 7 clients, not 8."""
    assert len(draw(tuple(range(100)), fraction=0.07)) == 7


def test_the_whole_fraction_takes_everyone_in_every_round():
    assert all(draw(seed=seed, round=round, fraction=1.0) == CLIENTS for seed in range(3) for round in range(1, 4))


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
            set(draw(round=round, fraction=0.1, at_least=3)),
            set(draw(rest, round=round, fraction=0.1, at_least=3)),
        )
        assert before - {missing} <= after
        assert len(after - before) == (missing in before)


def test_more_clients_drawn_contain_the_fewer():
    for round in range(1, 10):
        cohorts = [set(draw(round=round, fraction=n / 10)) for n in range(1, 11)]
        assert all(small < large for small, large in itertools.pairwise(cohorts))


def test_every_client_has_its_turn():
    """300 rounds of 3 in 10: 90 turns a client are expected, with a standard deviation of 8."""
    turns = Counter(client for round in range(300) for client in draw(round=round))
    assert set(turns) == set(CLIENTS)
    assert all(50 < count < 130 for count in turns.values())


def test_too_few_clients_are_refused():
    with pytest.raises(ValueError, match="3 clients wanted, 2 there"):
        draw((0, 1), at_least=3)
    with pytest.raises(ValueError, match="1 clients wanted, 0 there"):
        draw(())
