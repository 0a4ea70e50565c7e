"""Members whose nodes come and go: who is reached where, who is taken in, and who is refused by name."""

import logging
import math
from dataclasses import replace

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from helpers_runs import tiny

from fedunlearn.federation.link import Expectation, roll_call
from fedunlearn.federation.local_grid import SequentialGrid, call_client
from fedunlearn.federation.planning import Planner
from fedunlearn.federation.roster import Roster
from fedunlearn.federation.wire import REPLY, RollCallReply, pack_scalars
from fedunlearn.records.rounds import ClientRows
from fedunlearn.records.shape import ClientShape

ROWS = tuple(ClientRows(client_id=k, num_owned=10 + k, num_forget=0, num_retain=10 + k) for k in range(4))
EXPECTED = Expectation(
    rows=ROWS,
    shapes=(ClientShape(rank=4, lora_alpha=8.0),) * 4,
    version="1",
    base_fingerprint="b",
    partition_hash="p",
    request_hash="r",
    joins=(1,) * 4,
    min_clients=1,
)
CONTENT = RecordDict()


def says(client, **changes) -> RollCallReply:
    rows = ROWS[client]
    honest = RollCallReply(
        client_id=client, version="1", base_fingerprint="b", partition_hash="p", request_hash="r", num_owned=rows.num_owned, num_forget=0,
        num_retain=rows.num_retain, rank=4, lora_alpha=8.0, joins=1,
    )  # fmt: skip
    return replace(honest, **changes)


class ComingAndGoing(SequentialGrid):
    """Nodes by number, each with what it says at a roll call; None: it fails. asked: the nodes that were called, in order."""

    def __init__(self, **there):
        super().__init__(0)
        self.there, self.asked, self.told = {int(node[1:]): said for node, said in there.items()}, [], []
        self.app = ClientApp()

        @self.app.query()
        def answer(message: Message, context: Context) -> Message:
            said = self.there[context.node_id]
            if said is None:
                raise RuntimeError("no data")
            return Message(RecordDict({REPLY: pack_scalars(said)}), reply_to=message)

    def get_node_ids(self):
        return list(self.there)

    def _answer(self, message):
        node = message.metadata.dst_node_id
        self.asked.append(node)
        self.told.append(message.content)
        return call_client(self.app, Context(1, node, {}, RecordDict(), {}), message)


@pytest.fixture(scope="module")
def run(tmp_path_factory, pocket):
    """A run of four clients of whom two are drawn a round."""
    saves = tmp_path_factory.mktemp("saves")
    return tiny(pocket, saves, "finetune", "ft", "trainer.federated.fraction_train=0.5").run


def roster_of(grid, run, nodes_change=True, content=CONTENT, keep=lambda called: None, expected=EXPECTED, timeout=5.0):
    called = roll_call(grid, expected, 0.1, math.inf if timeout == 5.0 else timeout)
    grid.asked.clear(), grid.told.clear()
    planner = Planner(run, {k: ROWS[k] for k in called.members})
    return Roster(
        grid, expected, called, planner, nodes_change=nodes_change, content=content, timeout=timeout, keep=keep
    )


def planned(roster):
    """Who works in the first rounds."""
    return [[task.client_id for task in roster.planner.plan(number).tasks] for number in (1, 2)]


def test_members_are_those_of_the_roll_call(run):
    roster = roster_of(ComingAndGoing(n5=says(1), n7=says(0), n9=None), run)
    assert list(roster.members) == [0, 1]
    assert roster.nodes == {0: 7, 1: 5}


def test_who_is_there_already_is_not_asked_again(run):
    grid = ComingAndGoing(n5=says(0), n7=says(1), n9=None)
    roster = roster_of(grid, run)
    planner = roster.planner
    assert roster.renew() is roster
    assert grid.asked == []  # the one that failed neither
    assert roster.planner is planner


def test_where_nodes_do_not_change_nobody_is_asked(run):
    grid = ComingAndGoing(n5=says(0))
    roster = roster_of(grid, run, nodes_change=False)
    grid.there[6] = says(1)
    assert list(roster.renew().members) == [0]
    assert grid.asked == []


def test_a_newcomer_is_told_of_the_run_and_taken_in(run):
    grid = ComingAndGoing(n5=says(0), n6=says(3))
    told = RecordDict({REPLY: pack_scalars(says(0))})
    roster = roster_of(grid, run, content=told)
    before = planned(roster)
    grid.there[4] = says(1)
    grid.there[8] = says(2)
    assert list(roster.renew().members) == [0, 1, 2, 3]
    assert roster.nodes == {0: 5, 1: 4, 2: 8, 3: 6}
    assert grid.asked == [4, 8]
    assert grid.told == [told, told]
    assert planned(roster) == planned_by_all(run) != before
    roster.renew()
    assert grid.asked == [4, 8]


class Slow(ComingAndGoing):
    """Some nodes answer nothing for their first few calls."""

    def __init__(self, slow, **there):
        super().__init__(**there)
        self.slow = dict(slow)

    def push_messages(self, messages):
        messages = list(messages)
        pushed = super().push_messages(messages)
        for message in messages:
            node = message.metadata.dst_node_id
            if self.slow.get(node, 0):
                self.slow[node] -= 1
                self.asked.append(node)
                self._waiting.pop(message.metadata.message_id)
        return pushed


@pytest.mark.parametrize(("calls", "taken"), [(1, True), (2, False)])
def test_a_node_that_was_only_slow_is_asked_once_more(run, calls, taken):
    """Behind another run's task it cannot answer; one that is silent twice has had its chance."""
    grid = Slow({6: calls}, n5=says(0), n6=says(1))
    roster = roster_of(grid, run, timeout=0.3)
    assert list(roster.members) == [0]
    for _ in range(3):
        roster.renew()
    assert (1 in roster.members) is taken
    assert grid.asked == [6]


def test_what_newcomers_say_is_kept(run):
    kept = []
    grid = ComingAndGoing(n5=says(0))
    roster = roster_of(grid, run, keep=kept.append)
    roster.renew()
    assert kept == []
    grid.there |= {6: says(1), 7: says(0), 8: None}
    roster.renew()
    (called,) = kept
    assert list(called.members) == [0, 1]
    assert "client 1 is not there" in called.refused[0]  # of the first call
    assert any("node 7 says that it is client 0, which is there already as node 5" in fault for fault in called.refused)
    assert any("node 8 failed" in fault for fault in called.refused)


def test_a_key_is_one_client_s(run):
    """A registered node can neither pose as a client that is away nor push one out by saying its id."""
    expected = replace(EXPECTED, keys=lambda: {5: 0, 6: 1, 7: 2})
    grid = ComingAndGoing(n5=says(0), n6=says(0), n7=says(2))
    roster = roster_of(grid, run, expected=expected)
    assert roster.nodes == {0: 5, 2: 7}
    grid.there |= {8: says(3)}  # without a key of that name
    assert roster.renew().nodes == {0: 5, 2: 7, 3: 8}


def planned_by_all(run):
    planner = Planner(run, dict(enumerate(ROWS)))
    return [[task.client_id for task in planner.plan(number).tasks] for number in (1, 2)]


def test_a_client_whose_node_is_gone_is_reached_at_its_new_one_and_nothing_else_moves(run, caplog):
    grid = ComingAndGoing(n5=says(0), n6=says(1))
    roster = roster_of(grid, run)
    planner = roster.planner
    del grid.there[6]
    assert roster.renew().nodes == {0: 5, 1: 6}  # a member stays one; it may come back
    grid.there[9] = says(1)
    with caplog.at_level(logging.INFO):
        assert roster.renew().nodes == {0: 5, 1: 9}
    assert "client 1 is back, at another node" in caplog.text
    assert roster.planner is planner  # every draw is what it was


def test_a_client_that_is_there_is_nobody_elses_name(run, caplog):
    grid = ComingAndGoing(n5=says(0), n6=says(1))
    roster = roster_of(grid, run)
    grid.there[9] = says(1)
    assert roster.renew().nodes == {0: 5, 1: 6}
    assert "node 9 says that it is client 1, which is there already as node 6: the run goes on without" in caplog.text
    roster.renew()
    assert grid.asked == [9]  # asked once, as long as the other is there


def test_a_node_that_came_back_before_its_former_one_was_given_up_is_asked_again(run):
    """A node that was started again is new at once; the one it was is listed until its heartbeats are missed."""
    grid = ComingAndGoing(n5=says(0), n6=says(1))
    roster = roster_of(grid, run)
    grid.there[9] = says(1)
    assert roster.renew().nodes == {0: 5, 1: 6}
    del grid.there[6]
    assert roster.renew().nodes == {0: 5, 1: 9}
    assert grid.asked == [9, 9]
    roster.renew()
    assert grid.asked == [9, 9]


def test_a_node_that_was_refused_and_left_is_not_asked(run):
    grid = ComingAndGoing(n5=says(0), n6=says(1))
    roster = roster_of(grid, run)
    grid.there[9] = says(1)
    roster.renew()
    del grid.there[6], grid.there[9]
    assert roster.renew().nodes == {0: 5, 1: 6}
    assert grid.asked == [9]


def test_two_newcomers_of_one_name_are_both_refused(run, caplog):
    grid = ComingAndGoing(n5=says(0))
    roster = roster_of(grid, run)
    grid.there[8] = grid.there[9] = says(1)
    assert list(roster.renew().members) == [0]
    assert "roll call: 2 nodes say that they are client 1: the run goes on without" in caplog.text


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (says(1, base_fingerprint="x"), "client 1 has base_fingerprint='x', the server 'b'"),
        (says(1, client_id=77), "a node says that it is client 77"),
        (None, "node 9 failed: RuntimeError: no data"),
    ],
)
def test_a_newcomer_that_cannot_take_part_is_refused_by_name(run, caplog, said, told):
    grid = ComingAndGoing(n5=says(0))
    roster = roster_of(grid, run)
    grid.there[9] = said
    assert list(roster.renew().members) == [0]
    assert told in caplog.text
    roster.renew()
    assert grid.asked == [9]
