"""The server's side of the wire: who is there, and asking them all under one deadline."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedunlearn.errors import UserError
from fedunlearn.federation.wire import REPLY, RollCallReply, content_bytes, typed_record, unpack_scalars

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What every client must agree with at the roll call. num_owned: rows of the partition, client by client, of which it may declare fewer."""

    num_owned: tuple[int, ...]
    version: str
    base_fingerprint: str
    partition_hash: str


@dataclass(frozen=True, kw_only=True)
class Member:
    """A client that answered the roll call, and the node it is reached at in this run."""

    node_id: int
    declared: RollCallReply
    bytes_up: int


def exchange(grid: Grid, messages: Mapping[int, Message], timeout: float) -> Iterator[tuple[int, Message | None]]:
    """Sends all messages and yields (key, reply) as replies arrive; (key, None) at the end for those that did not within `timeout` seconds."""
    grid.push_messages(messages.values())
    waiting = {message.metadata.message_id: key for key, message in messages.items()}
    end = time.monotonic() + timeout
    while waiting and time.monotonic() < end:
        replies = list(grid.pull_messages(list(waiting)))
        for reply in replies:
            yield waiting.pop(reply.metadata.reply_to_message_id), reply
        if not replies:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    for key in waiting.values():
        yield key, None


def roll_call(grid: Grid, expected: Expectation, timeout: float) -> dict[int, Member]:
    """Asks every node who it is: once a run. Gives the members by client id, in order.

    Raises UserError telling all at once: nodes that did not answer or failed, two that say the same id, another version, base
    or partition than the server's.
    """
    nodes = _wait_for_nodes(grid, len(expected.num_owned), timeout)
    messages = {node: Message(RecordDict(), node, MessageType.QUERY, group_id="roll-call") for node in nodes}
    members: dict[int, Member] = {}
    faults: list[str] = []
    for node, reply in exchange(grid, messages, timeout):
        if reply is None or reply.has_error():
            faults.append(
                f"roll call: node {node} "
                + ("did not answer in time" if reply is None else f"failed: {reply.error.reason}")
            )
            continue
        try:
            declared = unpack_scalars(RollCallReply, typed_record(ConfigRecord, reply.content[REPLY]))
        except (KeyError, TypeError, ValueError) as error:
            faults.append(f"roll call: the reply of node {node} cannot be read: {error}")
            continue
        faults += _mismatches(declared, expected)
        if declared.client_id in members:
            faults.append(f"roll call: two nodes say that they are client {declared.client_id}")
        members[declared.client_id] = Member(node_id=node, declared=declared, bytes_up=content_bytes(reply.content))
    if faults:
        raise UserError(*dict.fromkeys(faults))
    return {client: members[client] for client in sorted(members)}


def _wait_for_nodes(grid: Grid, num_clients: int, timeout: float) -> list[int]:
    end = time.monotonic() + timeout
    while len(nodes := list(grid.get_node_ids())) < num_clients and time.monotonic() < end:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if len(nodes) != num_clients:
        raise UserError(
            f"roll call: {len(nodes)} nodes are there after {timeout:g} s, trainer.federated.num_clients={num_clients} are wanted"
        )
    return nodes


def _mismatches(declared: RollCallReply, expected: Expectation) -> list[str]:
    client = declared.client_id
    if not 0 <= client < len(expected.num_owned):
        return [
            f"roll call: a node says that it is client {client}, the partition has 0 to {len(expected.num_owned) - 1}"
        ]
    faults = [
        f"roll call: client {client} has {key}={getattr(declared, key)!r}, the server {getattr(expected, key)!r}"
        for key in ("version", "base_fingerprint", "partition_hash")
        if getattr(declared, key) != getattr(expected, key)
    ]
    counts = (declared.num_forget, declared.num_retain, declared.num_owned)
    if (
        min(counts) < 0
        or not declared.num_forget + declared.num_retain <= declared.num_owned <= expected.num_owned[client]
    ):
        owned = expected.num_owned[client]
        faults.append(
            f"roll call: client {client} declares forget, retain and owned rows {counts}, the partition gives it {owned}"
        )
    return faults
