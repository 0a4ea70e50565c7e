"""Rows that begin alike, laid out as trees: what several rows share is one path of the tree, run through the model once.

A tree branches where the full id sequences part, at any depth, never where a prompt is said to end: a tokenizer may merge the blank
before an answer with the answer's first word. Two answers that begin alike share those tokens too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fedunlearn.data.chat import EncodedRow

Ids = tuple[int, ...]
# Nodes whose time a forward pass takes however little it is given.
BATCH_COST = 256


@dataclass(frozen=True)
class Tree:
    """Rows as one sequence of nodes, in depth-first order: a node stands after all its ancestors.

    ids, depths: token and position in the row of each node. ends: one past the node's last descendant, hence node k is q or an ancestor of q
    where k <= q < ends[k]. contexts: for each of `rows` the nodes that predict its labels, in the labels' order.
    A row's last id is no node: it predicts nothing.
    """

    rows: tuple[EncodedRow, ...]
    ids: Ids
    depths: Ids
    ends: Ids
    contexts: tuple[Ids, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_path(self) -> bool:
        """Whether it does not branch: attention over it is plainly causal."""
        return min(self.ends) == len(self)


def plan_trees(rows: Iterable[EncodedRow], *, breadth: float, limit: int) -> list[Tree]:
    """Cuts the rows, in lexicographic order of their ids, into trees of least cost, longest tree first.

    A tree of n nodes costs n + n**2 / breadth: each node its share of the linear layers, and attention over the whole tree. breadth: nodes at
    which the two are equal; 0: each row is a tree of its own. limit: nodes of one tree (a longer row is a tree by itself).
    Where the cuts lie moves no score, only the time it takes.
    """
    ordered = sorted(set(rows), key=lambda row: (row.input_ids, row.num_prompt))
    lengths = [len(row.input_ids) - 1 for row in ordered]
    shared = [_alike(a.input_ids[:-1], b.input_ids[:-1]) for a, b in pairwise(ordered)]

    def costs(last: int) -> Iterator[float]:
        """Of the trees that end with this row: its own, then with each row before it whole and of its successor what they do not share."""
        nodes = lengths[last]
        yield nodes + (nodes * nodes / breadth if breadth else 0)
        for first in range(last - 1, -1, -1) if breadth else ():
            nodes += lengths[first] - shared[first]
            if nodes > limit:
                return
            yield nodes + nodes * nodes / breadth

    pieces = _cheapest_pieces(len(ordered), costs)
    return sorted((_tree(ordered[start:end]) for start, end in pieces), key=len, reverse=True)


def tree_batches(trees: Sequence[Tree], batch_tokens: int) -> list[list[Tree]]:
    """Cuts trees, sorted longest first, into batches of at most batch_tokens padded nodes, and at least one tree.

    Within that the cuts lie where they cost least: a batch costs its padded nodes and BATCH_COST for being one.
    """

    def costs(last: int) -> Iterator[float]:
        for first in range(last, -1, -1):
            padded = len(trees[first]) * (last - first + 1)
            if padded > batch_tokens and first < last:
                return
            yield padded + BATCH_COST

    return [list(trees[start:end]) for start, end in _cheapest_pieces(len(trees), costs)]


def _cheapest_pieces(count: int, costs: Callable[[int], Iterator[float]]) -> list[tuple[int, int]]:
    """Cuts 0 .. count-1 into consecutive pieces [start, end) of least total cost.

    costs(last): what the pieces that end with `last` cost, from the piece of it alone backwards, as far as a piece may reach.
    """
    least, begin = [0.0], [0]
    for last in range(count):
        total, start = min((least[last - i] + cost, last - i) for i, cost in enumerate(costs(last)))
        least.append(total)
        begin.append(start)
    pieces, end = [], count
    while end:
        pieces.append((begin[end], end))
        end = begin[end]
    return pieces[::-1]


def _alike(a: Ids, b: Ids) -> int:
    """Length of the longest common prefix."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def _tree(rows: Sequence[EncodedRow]) -> Tree:
    """Lays sorted rows out depth first; `path` holds the nodes of the row at hand, by depth."""
    ids: list[int] = []
    depths: list[int] = []
    ends: list[int] = []
    contexts: list[Ids] = []
    path: list[int] = []
    before: Ids = ()
    for row in rows:
        inputs = row.input_ids[:-1]
        kept = _alike(before, inputs)
        for node in path[kept:]:
            ends[node] = len(ids)
        fresh = range(len(ids), len(ids) + len(inputs) - kept)
        path[kept:] = fresh
        ids += inputs[kept:]
        depths += range(kept, len(inputs))
        ends += [0] * len(fresh)
        contexts.append(tuple(path[row.num_prompt - 1 :]))
        before = inputs
    for node in path:
        ends[node] = len(ids)
    return Tree(tuple(rows), tuple(ids), tuple(depths), tuple(ends), tuple(contexts))
