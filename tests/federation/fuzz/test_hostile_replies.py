"""Ten thousand hostile replies: whatever a client sends costs it its own update, never the run, and nothing counts that is not sound."""

import json
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common.serde import message_to_proto
from helpers_fuzz import LINE, ROOM, check_told, examples, grid_with, room_for, size_of
from helpers_mutations import mutated
from helpers_oracle import CODES, blob_in, good_reply, scalars_of, tensors_in
from helpers_recorded import CLIENTS, alone
from hypothesis import given
from hypothesis import strategies as st

from fedunlearn.federation import isolated_grid
from fedunlearn.federation.spool import Spool, open_spool
from fedunlearn.federation.turn import take_turn
from fedunlearn.federation.wire import one_line


@contextmanager
def turn_with(recorded, client, content, folder):
    """Takes the recorded turn with this reply of one client and the honest ones of the others; gives report and spool."""
    grid = grid_with(recorded, MessageType.TRAIN, client, content)
    with open_spool(folder) as spool, room_for(size_of(content)):
        yield take_turn(grid, recorded.members, recorded.turn, recorded.holds, spool), spool


def is_sound(recorded, client, content):
    """What the oracle says of one client's reply."""
    turn = recorded.turn
    (task,) = [task for task in turn.tasks if task.client_id == client]
    declared = recorded.members[client].declared
    sent = {name: tensor.numpy() for name, tensor in turn.shipment(task).start.items()}
    borrowed = task.role.value == "unlearn" and not declared.num_forget
    return good_reply(
        content,
        sent,
        run_id=turn.run_id,
        number=turn.number,
        client=client,
        base=turn.base_fingerprint,
        owned=declared.num_owned,
        most=len(turn.released) if borrowed else declared.num_owned,
        names=tuple(task.memory),
        ratio=np.inf if turn.max_update_ratio is None else turn.max_update_ratio,
    )


def check(recorded, client, content, folder):
    """The properties, of one reply."""
    with turn_with(recorded, client, content, folder) as (report, spool):
        counted = {update.client_id for update in report.updates}
        assert counted - {client} == set(range(CLIENTS)) - {client}, "an honest client lost its update"
        assert not any(outcome.reason for outcome in report.outcomes if outcome.client_id != client)
        (outcome,) = [outcome for outcome in report.outcomes if outcome.client_id == client]
        json.dumps(asdict(outcome), allow_nan=False).encode()
        check_told(outcome.detail)
        assert (client in counted) == (outcome.reason == "")
        assert set(report.holds) <= counted
        if outcome.reason:
            assert outcome.reason in CODES
            assert len(outcome.detail) <= LINE
            return outcome.reason
        assert content is not None
        assert is_sound(recorded, client, content), "an update counts that is not sound"
        _check_spooled(recorded, client, content, spool)
        return ""


def _check_spooled(recorded, client, content, spool: Spool):
    """What the reducer will read is bit by bit what was sent, and lies where float32 may lie."""
    sent = tensors_in(blob_in(content["adapter"]))
    with spool.reader([client]) as read:
        for name, (_, shape, raw) in sent.items():
            tensor = read(client, name)
            assert tensor.dtype == torch.float32
            assert tuple(tensor.shape) == shape
            assert tensor.numpy().tobytes() == raw
            assert tensor.data_ptr() % tensor.element_size() == 0, "a float32 tensor between two places of memory"


@pytest.mark.parametrize("name", ["tuned", "unlearned", "remembered"])
def test_what_a_client_really_said_counts(recorded_runs, place, name):
    for client in range(CLIENTS):
        recorded = recorded_runs[name]
        assert is_sound(recorded, client, recorded.said["train", client])
        assert check(recorded, client, recorded.said["train", client], place) == ""


@pytest.mark.parametrize(("name", "share"), [("tuned", 0.2), ("unlearned", 0.4), ("remembered", 0.4)])
def test_a_hostile_reply_costs_its_client_its_own_update(recorded_runs, place, name, share):
    recorded = recorded_runs[name]
    others = [*recorded.said.values(), *recorded.asked.values(), *recorded_runs["tuned"].said.values()]
    found = {}

    @examples(share)
    @given(st.data())
    def holds(data):
        client = data.draw(st.integers(0, CLIENTS - 1))
        content = data.draw(mutated(recorded.said["train", client], others))
        reason = check(recorded, client, content, place)
        found[reason] = found.get(reason, 0) + 1

    holds()
    assert len(found) > 2, found


def test_a_hostile_frame_of_the_clients_process_is_a_reply_or_an_error(recorded_runs):
    """What launcher.isolate=true reads from its pipe: whatever the bytes, an answer to this very message comes out, or one kind of error."""
    recorded = recorded_runs["tuned"]
    asked = alone(recorded, MessageType.TRAIN, 0, recorded.asked["train", 0])
    frame = message_to_proto(Message(recorded.said["train", 0], reply_to=asked)).SerializeToString()

    @examples(0.2)
    @given(st.data())
    def holds(data):
        sent = bytearray(frame[: data.draw(st.one_of(st.just(len(frame)), st.integers(0, len(frame))))])
        for _ in range(data.draw(st.integers(0, 4)) if sent else 0):
            sent[data.draw(st.integers(0, min(len(sent), 400) - 1))] ^= data.draw(st.integers(1, 255))
        with room_for(len(sent)):
            try:
                reply = isolated_grid._read(bytes(sent), asked)
            except isolated_grid._WorkerError as fault:
                check_told(one_line(str(fault)))
            else:
                assert reply.metadata.reply_to_message_id == asked.metadata.message_id
                assert reply.metadata.dst_node_id == asked.metadata.src_node_id

    holds()


def test_the_bound_on_memory_bites():
    with pytest.raises(MemoryError), room_for(0):
        bytearray(2 * ROOM)
    assert len(bytearray(2 * ROOM)) == 2 * ROOM


def test_the_oracle_is_no_yes_man(recorded_runs):
    """Each way in which a reply can be unsound is seen by the oracle itself."""
    recorded = recorded_runs["unlearned"]
    said = recorded.said["train", 0]
    data = scalars_of(said["reply"])
    for key, value in (("round", 1), ("round", True), ("run_id", "x"), ("num_examples", 27), ("num_trained", 0), ("num_steps", -1), ("seconds", float("nan")), ("memory", {"x": 1.0}), ("missing", ["x"]), ("loss", "x"), ("client_id", 1), ("base_fingerprint", "")):  # fmt: skip
        content = replace_json(said, {**data, key: value})
        assert not is_sound(recorded, 0, content), key


def replace_json(content, data):
    """The same content with other scalars."""
    return RecordDict({**content, "reply": ConfigRecord({"json": json.dumps(data)})})
