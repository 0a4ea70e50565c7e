"""Trees of rows that begin alike, by hand, and cuts of least cost against all cuts."""

from itertools import combinations, pairwise

import pytest

from fedunlearn.data.chat import EncodedRow
from fedunlearn.evals.branches import BATCH_COST, Tree, plan_trees, tree_batches


def test_a_tree_by_hand():
    """1 2 3 | 4, 1 2 5 | 6 7 and 1 2 | 3 8: nodes are 1 2 3 of the first and third (4 and 8 predict nothing), then 5 6 beside the 3."""
    rows = [EncodedRow((1, 2, 5, 6, 7), 3), EncodedRow((1, 2, 3, 4), 3), EncodedRow((1, 2, 3, 8), 2)]
    (tree,) = plan_trees(rows, breadth=1000, limit=100)
    assert tree.rows == (rows[1], rows[2], rows[0])
    assert (tree.ids, tree.depths, tree.ends) == ((1, 2, 3, 5, 6), (0, 1, 2, 2, 3), (5, 5, 3, 5, 5))
    assert tree.contexts == ((2,), (1, 2), (3, 4))
    assert not tree.is_path


def test_a_row_that_is_the_beginning_of_another_lies_on_its_path():
    short, long = EncodedRow((1, 2, 3), 1), EncodedRow((1, 2, 3, 4, 5), 2)
    (tree,) = plan_trees([long, short], breadth=1000, limit=100)
    assert (tree.rows, tree.ids, tree.contexts) == ((short, long), (1, 2, 3, 4), ((0, 1), (1, 2, 3)))
    assert tree.is_path


def test_prompts_of_two_lengths_share_all_nodes():
    one, two = EncodedRow((1, 2, 3, 4), 1), EncodedRow((1, 2, 3, 4), 3)
    (tree,) = plan_trees([two, one], breadth=1000, limit=100)
    assert (tree.ids, tree.contexts) == ((1, 2, 3), ((0, 1, 2), (2,)))


def test_without_breadth_each_row_is_alone_and_the_longest_comes_first():
    rows = [EncodedRow(tuple(range(length)), 1) for length in (3, 9, 5)]
    trees = plan_trees(rows, breadth=0, limit=100)
    assert [tree.ids for tree in trees] == [tuple(range(8)), tuple(range(4)), tuple(range(2))]
    assert all(tree.is_path for tree in trees)


def test_no_tree_passes_the_limit_but_a_row_longer_than_it():
    rows = [EncodedRow((1, 2, i, *range(10, 10 + length)), 2) for i, length in enumerate((3, 3, 3, 30, 3))]
    trees = plan_trees(rows, breadth=1e9, limit=12)
    assert sorted(len(tree) for tree in trees if len(tree) > 12) == [32]
    assert sorted(row for tree in trees for row in (r.input_ids for r in tree.rows)) == sorted(
        r.input_ids for r in rows
    )
    assert plan_trees([], breadth=5, limit=5) == []


@pytest.mark.parametrize("breadth", [3.0, 10.0, 40.0, 1000.0])
def test_cuts_are_the_cheapest_of_all(breadth):
    ids = [(1, 2, 3, 4, 9), (1, 2, 3, 5, 9, 9), (1, 2, 6, 9), (1, 7, 7, 7, 9), (1, 7, 7, 8, 9), (2, 3, 9), (2, 3, 4, 9)]
    rows = sorted((EncodedRow(row, 1) for row in ids), key=lambda row: row.input_ids)

    def cost(piece):
        nodes = len({row.input_ids[:end] for row in piece for end in range(1, len(row.input_ids))})
        return nodes + nodes**2 / breadth

    every = [
        [rows[a:b] for a, b in pairwise((0, *cuts, len(rows)))]
        for count in range(len(rows))
        for cuts in combinations(range(1, len(rows)), count)
    ]
    least = min(sum(map(cost, pieces)) for pieces in every)
    assert sum(cost(tree.rows) for tree in plan_trees(rows, breadth=breadth, limit=1000)) == pytest.approx(least)


def made(*lengths):
    return [Tree((), tuple(range(length)), (), (), ()) for length in lengths]


def test_batches_keep_the_token_budget():
    """Lengths 9 5 5 2 under 10 tokens: 9 | 5 5 | 2; a tree above the budget goes alone."""
    assert [[len(tree) for tree in batch] for batch in tree_batches(made(9, 5, 5, 2), 10)] == [[9], [5, 5], [2]]
    assert [len(batch) for batch in tree_batches(made(9, 5, 5, 2), 1)] == [1, 1, 1, 1]
    assert tree_batches([], 10) == []


def test_a_batch_is_cut_where_its_padding_would_cost_more_than_one_batch_more():
    long, short = BATCH_COST + 2, 1
    assert [len(batch) for batch in tree_batches(made(long, short), 10**6)] == [1, 1]
    assert [len(batch) for batch in tree_batches(made(BATCH_COST, short), 10**6)] == [2]
