"""One turn of a round: tasks go out, replies come back, the gate judges each, and what passes lies in the spool."""

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

import safetensors.torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedunlearn.aggregation.gate import Expected, Verdict, check_loss, check_update, judge_change
from fedunlearn.aggregation.reduce import UpdateNorms, update_norms
from fedunlearn.federation.faults import CLIENT_RAISED, REASON_OF_CODE
from fedunlearn.federation.link import Member, exchange
from fedunlearn.federation.parts import Depot, Shipment
from fedunlearn.federation.spool import Spool
from fedunlearn.federation.wire import (
    ADAPTER,
    MOST,
    PART,
    RELEASED,
    REPLY,
    REQUEST,
    TrainReply,
    TrainRequest,
    WireError,
    blob_of,
    check_records,
    content_bytes,
    one_line,
    pack_released,
    pack_scalars,
    typed_record,
    unpack_scalars,
)
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.requests import ReleasedRow
from fedunlearn.records.rounds import ClientOutcome, ClientTask, ClientUpdate, Role
from fedunlearn.records.shape import ClientShape

log = logging.getLogger(__name__)
Holds = Mapping[int, frozenset[str]]
HEADER_PER_TENSOR, HEADER = 512, 65_536


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """What goes out. depot: what tasks are made of. reads_reference: whether those who unlearn are sent what unlearning began with.

    shapes: ranks and scales of clients that have their own. max_reply_ratio: bytes of a reply over those awaited. max_update_ratio: see
    gate.judge_change. timeout: seconds for all.
    reads_losses: whether the server averages by training losses, so that one that cannot be right spoils the update.
    released: rows of the request that go, as text, to those who unlearn and own none of it.
    """

    number: int
    run_id: str
    base_fingerprint: str
    tasks: tuple[ClientTask, ...]
    depot: Depot
    reads_reference: bool
    shapes: Mapping[int, ClientShape]
    max_reply_ratio: float
    timeout: float
    max_update_ratio: float | None = None
    reads_losses: bool = False
    released: tuple[ReleasedRow, ...] = ()

    def shipment(self, task: ClientTask) -> Shipment:
        """What one task is made of."""
        return self.depot.shipment(self.shapes.get(task.client_id), self.reads_reference and task.role is Role.UNLEARN)


@dataclass(frozen=True, kw_only=True)
class TurnReport:
    """What came back: updates that count (their tensors lie in the spool), one outcome a client, the parts each client keeps now."""

    updates: tuple[ClientUpdate, ...] = ()
    outcomes: tuple[ClientOutcome, ...] = ()
    holds: Holds = field(default_factory=dict)

    def merge(self, later: "TurnReport") -> "TurnReport":
        """Gives both together; where a client stands in both, its later outcome, with the bytes of both."""
        again = {outcome.client_id: outcome for outcome in later.outcomes}
        outcomes = [_with_bytes_of(again.pop(o.client_id), o) if o.client_id in again else o for o in self.outcomes]
        return TurnReport(
            updates=tuple(sorted((*self.updates, *later.updates), key=lambda update: update.client_id)),
            outcomes=tuple(sorted((*outcomes, *again.values()), key=lambda outcome: outcome.client_id)),
            holds={**self.holds, **later.holds},
        )

    def without(self, verdicts: Mapping[int, Verdict]) -> "TurnReport":
        """Gives the report with some updates dropped after all."""
        outcomes = (
            replace(o, reason=verdicts[o.client_id].reason, detail=verdicts[o.client_id].detail)
            if o.client_id in verdicts
            else o
            for o in self.outcomes
        )
        return replace(
            self,
            updates=tuple(update for update in self.updates if update.client_id not in verdicts),
            outcomes=tuple(outcomes),
        )


def _with_bytes_of(outcome: ClientOutcome, earlier: ClientOutcome) -> ClientOutcome:
    return replace(
        outcome,
        bytes_down=outcome.bytes_down + earlier.bytes_down,
        bytes_down_reference=outcome.bytes_down_reference + earlier.bytes_down_reference,
        bytes_up=outcome.bytes_up + earlier.bytes_up,
    )


def take_turn(grid: Grid, members: Mapping[int, Member], turn: Turn, holds: Holds, spool: Spool) -> TurnReport:
    """Sends every task with the parts its client is not known to hold, judges every reply, and asks those that lack parts once more with all of them."""
    report, lacking = _ask(grid, members, turn, holds, spool)
    if lacking:
        log.warning("clients %s lacked parts of their task and are sent all of it", sorted(lacking))
        again = replace(turn, tasks=tuple(task for task in turn.tasks if task.client_id in lacking))
        second, _ = _ask(grid, members, again, {client: frozenset() for client in lacking}, spool)
        report = report.merge(second)
    return report


def _ask(
    grid: Grid, members: Mapping[int, Member], turn: Turn, holds: Holds, spool: Spool
) -> tuple[TurnReport, Set[int]]:
    """Gives the report, and the clients that answered that they lack parts."""
    tasks = {task.client_id: task for task in turn.tasks}
    messages, outcomes = {}, {}
    for client, task in tasks.items():
        content, outcomes[client] = _outgoing(
            turn, task, members[client].declared.num_forget > 0, holds.get(client, frozenset())
        )
        messages[client] = Message(content, members[client].node_id, MessageType.TRAIN, group_id=str(turn.number))
    updates: list[ClientUpdate] = []
    lacking: set[int] = set()
    kept: dict[int, frozenset[str]] = {}
    for client, reply in exchange(grid, messages.items(), turn.timeout):
        shipment = turn.shipment(tasks[client])
        judged = _judge(turn, tasks[client], shipment, members[client], reply, spool)
        outcomes[client] = _outcome(outcomes[client], judged)
        if judged.update is not None:
            updates.append(judged.update)
            if shipment.keep or client in holds:
                kept[client] = shipment.keep
        if judged.verdict.reason == "missing_part":
            lacking.add(client)
    return TurnReport(updates=tuple(updates), outcomes=tuple(outcomes.values()), holds=kept), lacking


def _outgoing(turn: Turn, task: ClientTask, owns: bool, held: frozenset[str]) -> tuple[RecordDict, ClientOutcome]:
    """Gives one task's message, and the outcome as far as it is known when it goes out."""
    shipment = turn.shipment(task)
    content = RecordDict({REQUEST: pack_scalars(_request(turn, task, shipment))})
    if turn.released and task.role is Role.UNLEARN and not owns:
        content[RELEASED] = pack_released(turn.released)
    beside = RecordDict()
    for name, part in shipment.lacking(held).items():
        content[PART + name] = part.packed
        if name in shipment.apart:
            beside[PART + name] = part.packed
    apart = content_bytes(beside)
    outcome = ClientOutcome(
        client_id=task.client_id,
        role=task.role,
        weight=0.0,
        bytes_down=content_bytes(content) - apart,
        bytes_down_reference=apart,
    )
    return content, outcome


def _request(turn: Turn, task: ClientTask, shipment: Shipment) -> TrainRequest:
    return TrainRequest(
        run_id=turn.run_id,
        round=turn.number,
        client_id=task.client_id,
        role=task.role.value,
        epochs=task.epochs,
        rounds=task.share.rounds,
        part=task.share.part,
        parts=task.share.parts,
        lr_scale=task.lr_scale,
        seed=task.seed,
        mu=task.mu,
        trained=task.trained.value,
        memory=dict(task.memory),
        radius=task.radius,
        adapter=tuple(part.hash for part in shipment.adapter),
        sidecar=tuple(part.hash for part in shipment.sidecar),
        reference=tuple(part.hash for part in shipment.reference),
        reference_sidecar=tuple(part.hash for part in shipment.reference_sidecar),
        keep=tuple(sorted(shipment.keep)),
    )


@dataclass(frozen=True, kw_only=True)
class _Judged:
    verdict: Verdict
    reply: TrainReply | None = None
    update: ClientUpdate | None = None
    norms: UpdateNorms | None = None
    bytes_up: int = 0


def _judge(
    turn: Turn, task: ClientTask, shipment: Shipment, member: Member, message: Message | None, spool: Spool
) -> _Judged:
    """Reads one reply, passes it through the gate, measures it and spools what counts; the tensors are let go of at once."""
    if message is None:
        return _Judged(verdict=Verdict("timeout", "no reply within round_timeout"))
    if message.has_error():
        reason = REASON_OF_CODE.get(message.error.code, REASON_OF_CODE[CLIENT_RAISED])
        return _Judged(verdict=Verdict(reason, message.error.reason or ""))
    size, reply, norms = 0, None, None
    expected = _expected(turn, task, shipment, member)
    try:
        size = content_bytes(message.content)
        reply = _read_reply(message.content)
        if reply.missing:
            raise WireError("missing_part", f"the client lacks {len(reply.missing)} parts of its task")
        blob = _read_blob(message.content, expected.tensors, turn.max_reply_ratio)
        update = _update(reply, safetensors.torch.load(blob))
        verdict = check_update(update, expected)
        if verdict.accepted and turn.reads_losses:
            verdict = check_loss(reply.loss)
        if verdict.accepted:
            norms = _norms(turn, task, shipment, update)
            verdict = judge_change(norms.factors, norms.start, turn.max_update_ratio)
    except WireError as fault:
        return _Judged(verdict=Verdict(fault.reason, str(fault)), reply=reply, bytes_up=size)
    except Exception as error:  # whatever a client can send costs it its own update, never the run
        verdict = Verdict("unreadable", f"{type(error).__name__}: {error}")
        return _Judged(verdict=verdict, reply=reply, bytes_up=size)
    if norms is None or not verdict.accepted:
        return _Judged(verdict=verdict, reply=reply, norms=norms, bytes_up=size)
    spool.keep(
        task.client_id, safetensors.torch.save(dict(update.tensors))
    )  # as we write it: their header may lay tensors out between two places of memory
    return _Judged(verdict=verdict, reply=reply, update=_measured(update, norms), norms=norms, bytes_up=size)


def _expected(turn: Turn, task: ClientTask, shipment: Shipment, member: Member) -> Expected:
    return Expected(
        client_id=task.client_id,
        tensors={name: tensor for name, tensor in shipment.start.items() if task.trained.covers(name)},
        round=turn.number,
        run_id=turn.run_id,
        base_fingerprint=turn.base_fingerprint,
        num_examples=member.declared.num_owned,
        memory=tuple(task.memory),
        max_trained=len(turn.released)
        if task.role is Role.UNLEARN and not member.declared.num_forget
        else member.declared.num_owned,
    )


def _read_reply(content: RecordDict) -> TrainReply:
    check_records(content, ADAPTER, REPLY)
    reply = unpack_scalars(TrainReply, typed_record(ConfigRecord, content.get(REPLY)))
    reply.check_account()
    return reply


def _read_blob(content: RecordDict, wanted: Tensors, max_ratio: float) -> bytes:
    """Gives the safetensors bytes, not yet read. Raises WireError where there are more than can be right."""
    record = typed_record(ArrayRecord, content.get(ADAPTER))
    size = sum(len(array.data) for array in record.values())
    awaited = sum(tensor.numel() * tensor.element_size() for tensor in wanted.values())
    limit = int(max_ratio * awaited) + HEADER_PER_TENSOR * len(wanted) + HEADER
    if size > limit:
        raise WireError("wire_size", f"{size} bytes of adapter, at most {limit} are read ({awaited} awaited)")
    return blob_of(record)


def _norms(turn: Turn, task: ClientTask, shipment: Shipment, update: ClientUpdate) -> UpdateNorms:
    """Measures against what this client was sent, at its own scale."""
    shape = turn.shapes.get(task.client_id)
    scales = turn.depot.scales if shape is None else dict.fromkeys(turn.depot.scales, shape.scale)
    return update_norms({**shipment.start, **update.tensors}, shipment.start, scales)


def _measured(update: ClientUpdate, norms: UpdateNorms) -> ClientUpdate:
    """Gives the update without its tensors, with its norms."""
    return replace(
        update,
        tensors={},
        update_norm=norms.update,
        factor_norm=norms.factors,
        product_norm=norms.product,
        module_norms=norms.by_module,
    )


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
        num_reference_tokens=reply.num_reference_tokens,
        seconds=reply.seconds,
        loss=reply.loss,
        loss_trace=reply.loss_trace,
        memory=reply.memory,
        base_fingerprint=reply.base_fingerprint,
    )


def _outcome(sent: ClientOutcome, judged: _Judged) -> ClientOutcome:
    reason, detail = judged.verdict.reason, one_line(judged.verdict.detail)
    if reason:
        log.warning("client %d is dropped this round: %s (%s)", sent.client_id, reason, detail)
    told = replace(sent, reason=reason, detail=detail, bytes_up=judged.bytes_up)
    reply = judged.reply
    if reply is None:
        return told
    return replace(
        told,
        update_norm=None if judged.norms is None else judged.norms.update,
        factor_norm=None if judged.norms is None else judged.norms.factors,
        num_examples=reply.num_examples,
        num_trained=reply.num_trained,
        num_steps=reply.num_steps,
        num_tokens=reply.num_tokens,
        num_reference_tokens=reply.num_reference_tokens,
        stopped=reply.stopped,
        seconds=reply.seconds,
        seconds_loading=reply.seconds_loading,
        loss=reply.loss if _is_told(reply.loss) else None,
        loss_trace=tuple(value for value in reply.loss_trace if _is_told(value)),
    )


def _is_told(loss: float) -> bool:
    """Whether a loss goes into the history: a number, and one that sums stay finite with."""
    return abs(loss) < MOST
