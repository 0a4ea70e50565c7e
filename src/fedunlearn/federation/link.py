"""The server's side of the wire: who is there, and asking them all under one deadline."""

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedunlearn.errors import UserError
from fedunlearn.federation.wire import (
    REPLY,
    RollCallReply,
    check_records,
    content_bytes,
    one_line,
    typed_record,
    unpack_scalars,
)
from fedunlearn.records.rounds import ClientRows
from fedunlearn.records.shape import ClientShape

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS, SENT_AT_ONCE = 0.02, 256
_SAYS_WHO = re.compile(r"client (\d{1,9}): ")
"""How the reason of a node that refuses begins: it tells whose it is."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What every client must agree with at the roll call. rows, shapes, joins: what each owns by the partition, its LoRA rank, and the
    round from which it is there; entry k is client k. layout: of the run's adapter at the model's own rank.

    min_clients: how many must be able to take part. keys: looks up which node has which client's key; empty where nodes have none.
    """

    rows: tuple[ClientRows, ...]
    shapes: tuple[ClientShape, ...]
    joins: tuple[int, ...]
    version: str
    base_fingerprint: str
    partition_hash: str
    request_hash: str
    min_clients: int
    quantization: str = "none"
    layout: str = ""
    keys: Callable[[], Mapping[int, int]] = dict


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A client that answered the roll call, and the node it is reached at in this run."""

    node_id: int
    declared: RollCallReply
    bytes_up: int


def rows_of(members: Mapping[int, Member]) -> dict[int, ClientRows]:
    """What each member owns, by client id."""
    return {client: member.declared.rows for client, member in members.items()}


@dataclass(frozen=True, kw_only=True)
class RollCall:
    """members: by client id, in order. refused: a sentence for each node or client that is left out. asked: the nodes that were there; silent: those of them that did not answer."""

    members: Mapping[int, Member]
    refused: tuple[str, ...]
    asked: frozenset[int] = frozenset()
    silent: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What some nodes said. found: those who can take part, by the client id that they say. refused: a sentence for each that cannot. silent: who did not answer.

    named: the clients whose nodes failed, as far as these say so; whoever is told as failed is not told as missing too.
    """

    found: Mapping[int, Sequence[Member]]
    refused: Sequence[str]
    silent: frozenset[int]
    named: frozenset[int]


def exchange(
    grid: Grid, messages: Iterable[tuple[int, Message]], timeout: float
) -> Iterator[tuple[int, Message | None]]:
    """Sends all messages and yields (key, reply) as replies arrive; (key, None) at the end for those that did not within `timeout` seconds.

    They are taken and sent some at a time, more whenever nothing comes back: nobody who is silent holds others up, and on a grid that
    answers at once few are ever in memory.
    """
    left, end = iter(messages), time.monotonic() + timeout
    waiting: dict[str, int] = {}
    while time.monotonic() < end:
        replies = list(grid.pull_messages(waiting.keys())) if waiting else []
        for reply in replies:
            key = waiting.pop(reply.metadata.reply_to_message_id, None)
            if key is None:
                log.warning("a reply that answers nothing, or what was answered already, is left unread")
            else:
                yield key, reply
        if replies:
            continue
        if more := list(islice(left, SENT_AT_ONCE)):
            grid.push_messages([message for _, message in more])
            waiting |= {message.metadata.message_id: key for key, message in more}
        elif waiting:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        else:
            return
    for key in (*waiting.values(), *(key for key, _ in left)):
        yield key, None


def roll_call(
    grid: Grid, expected: Expectation, timeout: float, answer_timeout: float, content: RecordDict | None = None
) -> RollCall:
    """Asks every node who it is: once a run. Nodes that are not there yet are waited for until `timeout` seconds have passed.

    answer_timeout: seconds for all answers together; infinite where the Grid keeps each client's time itself. content: what every node is told.

    A node that does not answer, or cannot take part (another version, base or partition, row counts that are not the partition's, two
    that say the same id), is refused by name and left out. Raises UserError, telling all at once, where fewer than
    expected.min_clients are left, or in unlearning one that owns forget rows is not among them: the request could not be served.
    """
    nodes = _wait_for_nodes(grid, len(expected.rows), timeout)
    answers = call_nodes(grid, nodes, expected, answer_timeout, content or RecordDict())
    found, refused = answers.found, list(answers.refused)
    refused += [
        f"roll call: {len(said)} nodes say that they are client {client}"
        for client, said in sorted(found.items())
        if len(said) > 1
    ]
    members = {client: said[0] for client, said in sorted(found.items()) if len(said) == 1}
    told = found.keys() | answers.named
    refused += [f"roll call: client {row.client_id} is not there" for row in expected.rows if row.client_id not in told]
    _check_enough(members, expected, refused)
    for fault in refused:
        log.warning("%s: the run goes on without", fault)
    return RollCall(members=members, refused=tuple(refused), asked=frozenset(nodes), silent=answers.silent)


def call_nodes(grid: Grid, nodes: Sequence[int], expected: Expectation, timeout: float, content: RecordDict) -> Answers:
    """Asks some nodes who they are."""
    messages = ((node, Message(content, node, MessageType.QUERY, group_id="roll-call")) for node in nodes)
    found: dict[int, list[Member]] = {}
    refused: list[str] = []
    silent: set[int] = set()
    named: set[int] = set()
    keys = expected.keys()
    for node, reply in exchange(grid, messages, timeout):
        if reply is None:
            silent.add(node)
        elif reply.has_error() and (said := _SAYS_WHO.match(_reason(reply))):
            named.add(int(said[1]))
        member = _read_member(node, reply)
        faults = [member] if isinstance(member, str) else _mismatches(member, expected, keys)
        refused += faults
        if not isinstance(member, str) and not faults:
            found.setdefault(member.declared.client_id, []).append(member)
    return Answers(found=found, refused=refused, silent=frozenset(silent), named=frozenset(named))


def _check_enough(members: Mapping[int, Member], expected: Expectation, refused: Sequence[str]) -> None:
    lost = [row.client_id for row in expected.rows if row.num_forget and row.client_id not in members]
    if lost:
        raise UserError(
            *refused,
            f"roll call: clients {lost} own forget rows and cannot take part: nobody else can unlearn these; mend the cause and start again",
        )
    if len(members) < expected.min_clients:
        raise UserError(
            *refused,
            f"roll call: {len(members)} of {len(expected.rows)} clients can take part, trainer.federated.min_clients={expected.min_clients} are wanted: mend the cause, or lower it",
        )


def _read_member(node: int, reply: Message | None) -> "Member | str":
    if reply is None:
        return f"roll call: node {node} did not answer in time"
    if reply.has_error():
        return f"roll call: node {node} failed: {_reason(reply)}"
    try:
        check_records(reply.content, REPLY)
        declared = unpack_scalars(RollCallReply, typed_record(ConfigRecord, reply.content.get(REPLY)))
        return Member(node_id=node, declared=declared, bytes_up=content_bytes(reply.content))
    except Exception as error:  # whatever a node can send costs it its own place, never the run
        return f"roll call: the reply of node {node} cannot be read: {one_line(str(error))}"


def _reason(reply: Message) -> str:
    return one_line(reply.error.reason or "")


def _wait_for_nodes(grid: Grid, num_clients: int, timeout: float) -> list[int]:
    end = time.monotonic() + timeout
    while len(nodes := list(grid.get_node_ids())) < num_clients and time.monotonic() < end:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return nodes


def _mismatches(member: Member, expected: Expectation, keys: Mapping[int, int]) -> list[str]:
    declared = member.declared
    client = declared.client_id
    if not 0 <= client < len(expected.rows):
        return [f"roll call: a node says that it is client {client}, the partition has 0 to {len(expected.rows) - 1}"]
    if keys.get(member.node_id, client) != client:
        return [
            f"roll call: a node with the key of client {keys[member.node_id]} says that it is client {client}: correct client_id in its site YAML"
        ]
    faults = [
        f"roll call: client {client} has {key}={getattr(declared, key)!r}, the server {getattr(expected, key)!r}"
        for key in ("version", "base_fingerprint", "quantization", "partition_hash", "request_hash")
        if getattr(declared, key) != getattr(expected, key)
    ]
    if declared.rows != expected.rows[client]:
        faults.append(
            f"roll call: client {client} declares forget, retain and owned rows {_counts(declared.rows)}, by the partition it has {_counts(expected.rows[client])}"
        )
    shape = expected.shapes[client]
    if (declared.rank, declared.lora_alpha) != (shape.rank, shape.lora_alpha):
        faults.append(
            f"roll call: client {client} has LoRA rank {declared.rank} and alpha {declared.lora_alpha:g}, by the config {shape.rank} and {shape.lora_alpha:g}"
        )
    if declared.layout != expected.layout:
        faults.append(
            f"roll call: client {client} makes an adapter of other tensors or shapes than the server's (target_modules, modules_to_save, lora_bias, use_dora): all of these come with the server's config, so install the same release at both"
        )
    if declared.joins != expected.joins[client]:
        faults.append(
            f"roll call: client {client} joins in round {declared.joins}, by the config in round {expected.joins[client]}"
        )
    return faults


def _counts(rows: ClientRows) -> tuple[int, int, int]:
    return rows.num_forget, rows.num_retain, rows.num_owned
