"""One turn of a round: tasks go out, replies come back, the gate judges each, and what passes lies in the spool."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import safetensors.torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from safetensors import SafetensorError

from fedunlearn.aggregation.gate import Expected, Verdict, check_update
from fedunlearn.federation.link import Member, exchange
from fedunlearn.federation.spool import Spool
from fedunlearn.federation.wire import (
    ADAPTER,
    REFERENCE,
    REPLY,
    REQUEST,
    TrainReply,
    TrainRequest,
    blob_of,
    content_bytes,
    pack_adapter,
    pack_scalars,
    typed_record,
    unpack_scalars,
)
from fedunlearn.records.adapter import Adapter, Tensors, hash_tensors
from fedunlearn.records.rounds import ClientOutcome, ClientTask, ClientUpdate, Role

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What goes out. reference: the adapter that unlearning began with, where the method reads it. timeout: seconds for all."""

    number: int
    run_id: str
    tasks: tuple[ClientTask, ...]
    adapter: Tensors
    reference: Adapter | None
    timeout: float


@dataclass(frozen=True, kw_only=True)
class TurnReport:
    """What came back: updates that count (their tensors lie in the spool), one outcome a client, who holds the reference now."""

    updates: tuple[ClientUpdate, ...] = ()
    outcomes: tuple[ClientOutcome, ...] = ()
    holders: frozenset[int] = frozenset()

    def merge(self, later: "TurnReport") -> "TurnReport":
        """Gives both together; where a client stands in both, its later outcome, with the bytes of both."""
        again = {outcome.client_id: outcome for outcome in later.outcomes}
        outcomes = [_with_bytes_of(again.pop(o.client_id), o) if o.client_id in again else o for o in self.outcomes]
        return TurnReport(
            updates=tuple(sorted((*self.updates, *later.updates), key=lambda update: update.client_id)),
            outcomes=tuple(sorted((*outcomes, *again.values()), key=lambda outcome: outcome.client_id)),
            holders=self.holders | later.holders,
        )


def _with_bytes_of(outcome: ClientOutcome, earlier: ClientOutcome) -> ClientOutcome:
    return replace(
        outcome,
        bytes_down=outcome.bytes_down + earlier.bytes_down,
        bytes_down_reference=outcome.bytes_down_reference + earlier.bytes_down_reference,
        bytes_up=outcome.bytes_up + earlier.bytes_up,
    )


def take_turn(
    grid: Grid, members: Mapping[int, Member], turn: Turn, holders: frozenset[int], spool: Spool
) -> TurnReport:
    """Sends every task, judges every reply, and asks those that lack the reference once more with it.

    A client without the reference gets it beside its task, except where the global adapter is the reference still.
    """
    same = turn.reference is not None and hash_tensors(turn.adapter) == turn.reference.tensor_hash
    with_reference = {t.client_id for t in turn.tasks if _wants(turn, t) and not same and t.client_id not in holders}
    report, lacking = _ask(grid, members, turn, with_reference, spool)
    if lacking:
        again = replace(turn, tasks=tuple(task for task in turn.tasks if task.client_id in lacking))
        second, still = _ask(grid, members, again, lacking, spool)
        report = report.merge(second)
        log.warning(
            "clients %s lacked the reference adapter and were sent it; %s lack it still", sorted(lacking), sorted(still)
        )
    held = {u.client_id for u in report.updates for t in turn.tasks if t.client_id == u.client_id and _wants(turn, t)}
    return replace(report, holders=holders | held)


def _wants(turn: Turn, task: ClientTask) -> bool:
    return turn.reference is not None and task.role is Role.UNLEARN


def _ask(
    grid: Grid, members: Mapping[int, Member], turn: Turn, with_reference: set[int], spool: Spool
) -> tuple[TurnReport, set[int]]:
    """Gives the report, and the clients that answered that they lack the reference."""
    adapter = pack_adapter(turn.adapter)
    reference = pack_adapter(turn.reference.tensors) if turn.reference and with_reference else None
    tasks = {task.client_id: task for task in turn.tasks}
    messages, outcomes = {}, {}
    for client, task in tasks.items():
        extra = reference if client in with_reference else None
        content = _content(turn, task, adapter, extra)
        extra_bytes = content_bytes(RecordDict({REFERENCE: extra})) if extra else 0
        outcomes[client] = ClientOutcome(
            client_id=client,
            role=task.role,
            weight=0.0,
            bytes_down=content_bytes(content) - extra_bytes,
            bytes_down_reference=extra_bytes,
        )
        messages[client] = Message(content, members[client].node_id, MessageType.TRAIN, group_id=str(turn.number))
    declared = {client: member.declared.num_owned for client, member in members.items()}
    expected = Expected(adapter=turn.adapter, round=turn.number, run_id=turn.run_id, num_examples=declared)
    updates, lacking = [], set()
    for client, reply in exchange(grid, messages, turn.timeout):
        judged = _judge(client, reply, expected, spool)
        outcomes[client] = _outcome(outcomes[client], judged)
        if judged.update is not None:
            updates.append(judged.update)
        if judged.lacks_reference:
            lacking.add(client)
    return TurnReport(updates=tuple(updates), outcomes=tuple(outcomes.values())), lacking


def _content(turn: Turn, task: ClientTask, adapter: ArrayRecord, reference: ArrayRecord | None) -> RecordDict:
    wanted = turn.reference.tensor_hash if turn.reference is not None and _wants(turn, task) else ""
    request = TrainRequest(
        run_id=turn.run_id,
        round=turn.number,
        client_id=task.client_id,
        role=task.role.value,
        epochs=task.epochs,
        lr_scale=task.lr_scale,
        seed=task.seed,
        reference_hash=wanted,
    )
    content = RecordDict({ADAPTER: adapter, REQUEST: pack_scalars(request)})
    if reference is not None:
        content[REFERENCE] = reference
    return content


@dataclass(frozen=True, kw_only=True)
class _Judged:
    verdict: Verdict
    reply: TrainReply | None = None
    update: ClientUpdate | None = None
    bytes_up: int = 0
    lacks_reference: bool = False


def _judge(client: int, message: Message | None, expected: Expected, spool: Spool) -> _Judged:
    """Reads one reply, passes it through the gate, and spools what counts; the tensors are let go of at once."""
    if message is None:
        return _Judged(verdict=Verdict("timeout", "no reply within round_timeout"))
    if message.has_error():
        return _Judged(verdict=Verdict("crashed", _first_line(message.error.reason or "")))
    size = content_bytes(message.content)
    try:
        reply = unpack_scalars(TrainReply, typed_record(ConfigRecord, message.content[REPLY]))
        reply.check_account()
        if reply.needs_reference:
            return _Judged(
                verdict=Verdict("no_reference", "the client lacked the reference adapter"),
                bytes_up=size,
                lacks_reference=True,
            )
        blob = blob_of(typed_record(ArrayRecord, message.content[ADAPTER]))
        tensors = safetensors.torch.load(blob)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        return _Judged(verdict=Verdict("unreadable", _first_line(f"{type(error).__name__}: {error}")), bytes_up=size)
    update = _update(reply, tensors)
    verdict = (
        check_update(update, expected)
        if reply.client_id == client
        else Verdict("stale_round", f"reply of client {reply.client_id}")
    )
    if not verdict.accepted:
        return _Judged(verdict=verdict, reply=reply, bytes_up=size)
    spool.keep(client, blob)
    return _Judged(verdict=verdict, reply=reply, update=replace(update, tensors={}), bytes_up=size)


def _first_line(text: str) -> str:
    """A traceback belongs into the log; a line of history takes its first line."""
    return text.strip().split("\n")[0][:300]


def _update(reply: TrainReply, tensors: Tensors) -> ClientUpdate:
    return ClientUpdate(
        client_id=reply.client_id,
        round=reply.round,
        run_id=reply.run_id,
        tensors=tensors,
        num_examples=reply.num_examples,
        num_trained=reply.num_trained,
        num_steps=reply.num_steps,
        num_tokens=reply.num_tokens,
        seconds=reply.seconds,
        loss=reply.loss,
        loss_trace=reply.loss_trace,
    )


def _outcome(sent: ClientOutcome, judged: _Judged) -> ClientOutcome:
    if not judged.verdict.accepted:
        log.warning(
            "client %d is dropped this round: %s (%s)", sent.client_id, judged.verdict.reason, judged.verdict.detail
        )
    reply = judged.reply
    if reply is None:
        return replace(sent, reason=judged.verdict.reason, detail=judged.verdict.detail, bytes_up=judged.bytes_up)
    return replace(
        sent,
        reason=judged.verdict.reason,
        detail=judged.verdict.detail,
        num_examples=reply.num_examples,
        num_trained=reply.num_trained,
        num_steps=reply.num_steps,
        num_tokens=reply.num_tokens,
        seconds=reply.seconds,
        loss=_finite(reply.loss),
        loss_trace=tuple(value for value in reply.loss_trace if math.isfinite(value)),
        bytes_up=judged.bytes_up,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
