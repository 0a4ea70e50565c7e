"""Who is there, where nodes come and go: members by client id, each at the node where it is reached now."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedunlearn.federation.link import Expectation, Member, RollCall, call_nodes
from fedunlearn.federation.planning import Planner

log = logging.getLogger(__name__)
TIMES_CALLED = 2


class Roster:
    """The members of a run, and plans over them.

    nodes_change: whether nodes may come and go while it lasts; content, timeout: of a newcomer's roll call. keep: is handed the roll call as it is after newcomers.
    """

    def __init__(
        self,
        grid: Grid,
        expected: Expectation,
        called: RollCall,
        planner: Planner,
        *,
        nodes_change: bool,
        content: RecordDict,
        timeout: float,
        keep: Callable[[RollCall], None],
    ) -> None:
        self._grid = grid
        self._expected = expected
        self._members = dict(called.members)
        self._planner = planner
        self._nodes: dict[int, int] | None = None
        self._refused = list(called.refused)
        self._known = set(called.asked - called.silent)
        self._silent = Counter(called.silent)
        self._rivals: dict[int, int] = {}
        self._nodes_change = nodes_change
        self._content = content
        self._timeout = timeout
        self._keep = keep

    @property
    def members(self) -> Mapping[int, Member]:
        """By client id, in order."""
        return self._members

    @property
    def planner(self) -> Planner:
        """Plans over these members."""
        return self._planner

    @property
    def nodes(self) -> Mapping[int, int]:
        """Client id -> the node it is reached at."""
        if self._nodes is None:
            self._nodes = {client: member.node_id for client, member in self._members.items()}
        return self._nodes

    def renew(self) -> "Roster":
        """Calls nodes that are new; gives itself, with the members as they are then.

        A client whose former node is gone is reached at its new one; a node that says the id of a client that is still there is refused by name. A
        node is asked once; once more when the one for which it was refused is gone (a node that was started again is there before its former self is given up), and
        where it did not answer: another run's task may have kept it busy.
        """
        if not self._nodes_change:
            return self
        there = set(self._grid.get_node_ids())
        freed = {node for node, rival in self._rivals.items() if rival not in there}
        self._known -= freed
        self._rivals = {node: rival for node, rival in self._rivals.items() if node not in freed}
        new = sorted(there - self._known)
        if new:
            self._call(new, there)
            self._members, self._nodes = dict(sorted(self._members.items())), None
            if self._members.keys() != self._planner.rows.keys():
                self._planner = Planner(self._planner.run, {k: self._expected.rows[k] for k in self._members})
            self._keep(RollCall(members=self._members, refused=tuple(self._refused)))
        return self

    def _call(self, new: list[int], there: set[int]) -> None:
        answers = call_nodes(self._grid, new, self._expected, self._timeout, self._content)
        self._silent.update(answers.silent)
        self._known.update(node for node in new if node not in answers.silent or self._silent[node] >= TIMES_CALLED)
        refused = list(answers.refused)
        for client, said in sorted(answers.found.items()):
            refused += self._take(client, said, there)
        for fault in refused:
            log.warning("%s: the run goes on without", fault)
        self._refused += refused

    def _take(self, client: int, said: Sequence[Member], there: set[int]) -> list[str]:
        former = self._members.get(client)
        if len(said) > 1:
            return [f"roll call: {len(said)} nodes say that they are client {client}"]
        if former is not None and former.node_id in there:
            self._rivals[said[0].node_id] = former.node_id
            return [
                f"roll call: node {said[0].node_id} says that it is client {client}, which is there already as node {former.node_id}"
            ]
        log.info("client %d is %s", client, "back, at another node" if former else "there now")
        self._members[client] = said[0]
        return []
