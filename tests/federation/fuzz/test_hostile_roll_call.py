"""Hostile replies at the roll call and of clients' own scores: they cost their client its place or its score, and nobody else anything."""

import json
import math
from dataclasses import asdict, replace

import pytest
from flwr.app import MessageType, RecordDict
from helpers_fuzz import LINE, check_told, examples, grid_with, room_for, size_of
from helpers_mutations import mutated
from helpers_oracle import CODES, is_number, scalars_of
from helpers_recorded import CLIENTS
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.errors import UserError
from fedunlearn.federation.client_evaluation import take_survey
from fedunlearn.federation.link import roll_call

RUNS = ["tuned", "unlearned", "remembered"]
KINDS = ("forget", "retain")
FIGURES = ("forget_loss", "forget_prob", "retain_loss", "retain_prob")
LARGEST_LOSS = 1e6


def hostile(recorded_runs, name, kind, share, check):
    """Draws mutations of one client's reply, checks each, and gives how many there were."""
    recorded = recorded_runs[name]
    others, seen = [*recorded.said.values(), *recorded.asked.values()], []

    @examples(share)
    @given(st.data())
    def holds(data):
        client = data.draw(st.integers(0, CLIENTS - 1))
        content = data.draw(mutated(recorded.said[kind, client], others))
        check(recorded, client, content)
        seen.append(client)

    holds()
    return len(seen)


# --- the roll call


def same_scalars(content, honest) -> bool:
    """Whether a reply says what the honest one said, value for value and type for type (a whole number may stand for a float)."""
    mine, theirs = scalars_of((content or {}).get("reply")), scalars_of(honest["reply"])
    if mine is None or set(mine) != set(theirs):
        return False
    return all("seconds" in key or _same(mine[key], value) for key, value in theirs.items())


def _same(mine, value) -> bool:
    return mine == value and (type(mine) is type(value) or (type(mine), type(value)) == (int, float))


def check_called(recorded, client, content):
    """Whoever declares anything else than it must is left out, by name; the others are not."""
    needed = [k for k in range(CLIENTS) if recorded.expected.rows[k].num_forget]
    expected = replace(recorded.expected, min_clients=1)
    grid = grid_with(recorded, MessageType.QUERY, client, content)
    honest = {k: recorded.members[k].declared for k in range(CLIENTS)}
    try:
        with room_for(size_of(content)):
            called = roll_call(grid, expected, 5.0, math.inf)
    except UserError as fault:
        told = fault.faults[:-1]
        ended = fault.faults[-1]
        called = None
    if called is None:
        assert needed, "the run ended, and nobody was needed"
        assert "own forget rows and cannot take part" in ended
    else:
        told = called.refused
        for k, member in called.members.items():
            assert member.declared == honest[k], "a member that declared something else"
        assert set(called.members) >= set(range(CLIENTS)) - {client} - _borrowed(content)
        if client in called.members:
            assert same_scalars(content, recorded.said[MessageType.QUERY, client])
            assert content is None or set(content) == {"reply"}
    for line in told:
        check_told(line)
        assert line.startswith("roll call: ")
        assert len(line) < 4 * LINE


def _borrowed(content) -> set:
    """The id that a reply claims: two nodes of one id are both left out."""
    said = scalars_of((content or {}).get("reply")) or {}
    return {said.get("client_id")} if type(said.get("client_id")) is int else set()


@pytest.mark.parametrize("name", RUNS)
def test_a_hostile_reply_at_the_roll_call_costs_its_node_its_place(recorded_runs, name):
    assert hostile(recorded_runs, name, MessageType.QUERY, 0.15, check_called) >= 10


# --- clients' own scores


def sound_score(recorded, client, content) -> bool:
    """Whether a reply is of this survey and possible."""
    survey, member = recorded.survey, recorded.members[client].declared
    said = scalars_of((content or {}).get("reply"))
    honest = scalars_of(recorded.said[MessageType.EVALUATE, client]["reply"])
    if said is None or set(said) != set(honest) or set(content) != {"reply"}:
        return False
    who = (said["run_id"], said["round"], said["client_id"], said["base_fingerprint"])
    counts = [min(n, survey.rows) for n in (member.num_forget, member.num_retain)]
    if not all(is_number(said[key]) for key in FIGURES):
        return False
    return (
        who == (survey.run_id, survey.number, client, survey.base_fingerprint)
        and all(type(said[key]) is int for key in ("round", "client_id", "num_forget", "num_retain"))
        and [said["num_forget"], said["num_retain"]] == counts
        and said["missing"] == []
        and all(
            0 <= said[f"{kind}_loss"] <= LARGEST_LOSS and 0 <= said[f"{kind}_prob"] <= 1
            for kind in ("forget", "retain")
        )
        and all(
            counts[k] or said[f"{kind}_loss"] == said[f"{kind}_prob"] == 0
            for k, kind in enumerate(("forget", "retain"))
        )
    )


def check_scored(recorded, client, content):
    """What is impossible is told and left out of the means; what counts is in them."""
    grid = grid_with(recorded, MessageType.EVALUATE, client, content)
    with room_for(size_of(content)):
        found = take_survey(grid, recorded.members, replace(recorded.survey, timeout=60.0))
    scores = {score.client_id: score for score in found.clients}
    assert set(scores) == set(range(CLIENTS))
    assert not any(score.reason for k, score in scores.items() if k != client)
    json.dumps(asdict(found), allow_nan=False).encode()
    check_told(scores[client].detail)
    if scores[client].reason:
        assert scores[client].reason in CODES
        assert len(scores[client].detail) <= LINE
    else:
        assert sound_score(recorded, client, content), "a score counts that cannot be"
    for kind in ("forget", "retain"):
        counted = [(getattr(s, f"num_{kind}"), getattr(s, f"{kind}_loss")) for s in scores.values() if not s.reason]
        total = sum(count for count, _ in counted)
        mean = sum(count * loss for count, loss in counted) / total if total else None
        assert found.figures[f"{kind}_loss"] == (None if mean is None else pytest.approx(mean, rel=1e-12))


@pytest.mark.parametrize("name", RUNS)
def test_what_clients_really_scored_counts(recorded_runs, name):
    recorded = recorded_runs[name]
    for client in range(CLIENTS):
        assert sound_score(recorded, client, recorded.said[MessageType.EVALUATE, client])
        check_scored(recorded, client, recorded.said[MessageType.EVALUATE, client])
        check_called(recorded, client, recorded.said[MessageType.QUERY, client])


@pytest.mark.parametrize("name", RUNS)
def test_a_hostile_score_costs_its_client_its_score(recorded_runs, name):
    assert hostile(recorded_runs, name, MessageType.EVALUATE, 0.15, check_scored) >= 10


def test_no_reply_at_all_is_told(recorded_runs):
    check_called(recorded_runs["tuned"], 0, None)
    check_scored(recorded_runs["tuned"], 0, RecordDict())
