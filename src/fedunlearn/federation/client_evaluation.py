"""Clients score the global adapter on rows of their own, by Flower's evaluate messages: what they say never reaches training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedunlearn.aggregation.gate import Verdict
from fedunlearn.federation.faults import CLIENT_RAISED, LOST, REASON_OF_CODE
from fedunlearn.federation.link import Member, exchange
from fedunlearn.federation.parts import Depot
from fedunlearn.federation.wire import (
    PART,
    REPLY,
    REQUEST,
    EvaluateReply,
    EvaluateRequest,
    WireError,
    check_records,
    content_bytes,
    one_line,
    pack_scalars,
    typed_record,
    unpack_scalars,
)
from fedunlearn.limits import LARGEST
from fedunlearn.records.rounds import ClientEvaluation, ClientScore
from fedunlearn.records.shape import ClientShape

KINDS = ("forget", "retain")
NUMBERS = ("loss", "prob")


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """What is asked after a round. depot: the global adapter's parts. rows: of each kind at most (None: all). held: parts each client keeps for training.

    timeout: seconds for all.
    """

    number: int
    run_id: str
    base_fingerprint: str
    depot: Depot
    shapes: Mapping[int, ClientShape]
    held: Mapping[int, frozenset[str]]
    rows: int | None
    seed: int
    timeout: float


def take_survey(grid: Grid, members: Mapping[int, Member], survey: Survey) -> ClientEvaluation:
    """Asks every member that has rows, once more with all parts where it lacks some; whoever gives no usable answer is told and left out of the means."""
    asked = {client: member for client, member in members.items() if member.declared.rows.some}
    scores = _ask(grid, asked, survey)
    lacking = {score.client_id: asked[score.client_id] for score in scores if score.reason == "missing_part"}
    if lacking:
        nothing = replace(survey, held={**survey.held, **dict.fromkeys(lacking, frozenset())})
        again = {score.client_id: score for score in _ask(grid, lacking, nothing)}
        scores = [_both(score, again.get(score.client_id)) for score in scores]
    counted = [score for score in scores if not score.reason]
    figures = {f"{kind}_{number}": _mean(counted, kind, number) for kind in KINDS for number in NUMBERS}
    return ClientEvaluation(figures=figures, clients=tuple(scores))


def lost_in_survey(number: int, survey: ClientEvaluation) -> list[str]:
    """Gives a sentence for each client that raised, died or fell silent while it was asked; number: the round."""
    return [
        f"round {number}, evaluation by the clients: client {score.client_id}: {score.reason} ({score.detail})"
        for score in survey.clients
        if score.reason in LOST
    ]


def _ask(grid: Grid, members: Mapping[int, Member], survey: Survey) -> list[ClientScore]:
    messages, sent = {}, {}
    for client, member in members.items():
        content = _content(survey, client)
        sent[client] = content_bytes(content)
        messages[client] = Message(content, member.node_id, MessageType.EVALUATE, group_id=str(survey.number))
    found = {}
    for client, reply in exchange(grid, messages.items(), survey.timeout):
        found[client] = replace(_judged(survey, members[client], reply), bytes_down=sent[client])
    return [found[client] for client in sorted(found)]


def _content(survey: Survey, client: int) -> RecordDict:
    shipment, held = survey.depot.shipment(survey.shapes.get(client), False), survey.held.get(client, frozenset())
    request = EvaluateRequest(
        run_id=survey.run_id,
        round=survey.number,
        client_id=client,
        rows=survey.rows or 0,
        seed=survey.seed,
        adapter=tuple(part.hash for part in shipment.adapter),
        sidecar=tuple(part.hash for part in shipment.sidecar),
        keep=tuple(sorted(held | shipment.keep)),
    )
    content = RecordDict({REQUEST: pack_scalars(request)})
    for name, part in shipment.lacking(held).items():
        content[PART + name] = part.packed
    return content


def _judged(survey: Survey, member: Member, message: Message | None) -> ClientScore:
    client = member.declared.client_id
    if message is None:
        return ClientScore(client_id=client, reason="timeout", detail="no reply within round_timeout")
    if message.has_error():
        reason = REASON_OF_CODE.get(message.error.code, REASON_OF_CODE[CLIENT_RAISED])
        return ClientScore(client_id=client, reason=reason, detail=one_line(message.error.reason or ""))
    size = 0
    try:
        size = content_bytes(message.content)
        check_records(message.content, REPLY)
        reply = unpack_scalars(EvaluateReply, typed_record(ConfigRecord, message.content.get(REPLY)))
        verdict = _verdict(survey, member, reply)
    except WireError as fault:
        verdict = Verdict(fault.reason, str(fault))
    except Exception as error:  # whatever a client can send costs it its own score, never the run
        verdict = Verdict("unreadable", f"{type(error).__name__}: {error}")
    if verdict.reason:
        return ClientScore(client_id=client, reason=verdict.reason, detail=one_line(verdict.detail), bytes_up=size)
    return ClientScore(
        client_id=client,
        num_forget=reply.num_forget,
        num_retain=reply.num_retain,
        forget_loss=reply.forget_loss,
        forget_prob=reply.forget_prob,
        retain_loss=reply.retain_loss,
        retain_prob=reply.retain_prob,
        bytes_up=size,
    )


def _verdict(survey: Survey, member: Member, reply: EvaluateReply) -> Verdict:
    """Whether a reply is of this survey, over as many rows as it must be, and possible."""
    said = member.declared
    if (reply.client_id, reply.round, reply.run_id) != (said.client_id, survey.number, survey.run_id):
        return Verdict("stale_round", f"client {reply.client_id}, round {reply.round} of run {reply.run_id[:40]}")
    if reply.base_fingerprint != survey.base_fingerprint:
        return Verdict("base_mismatch", f"scored on the base {reply.base_fingerprint[:40]!r}")
    if reply.missing:
        return Verdict("missing_part", f"the client lacks {len(reply.missing)} parts of the adapter")
    wanted = tuple(n if survey.rows is None else min(n, survey.rows) for n in (said.num_forget, said.num_retain))
    if (reply.num_forget, reply.num_retain) != wanted:
        return Verdict("num_examples", f"scored {reply.num_forget} and {reply.num_retain} rows instead of {wanted}")
    for kind in KINDS:
        loss, prob = getattr(reply, f"{kind}_loss"), getattr(reply, f"{kind}_prob")
        if not (math.isfinite(loss) and math.isfinite(prob)):
            return Verdict("nan", f"{kind}: loss {loss}, probability {prob}")
        if not (0 <= loss <= LARGEST and 0 <= prob <= 1) or ((loss or prob) and not getattr(reply, f"num_{kind}")):
            return Verdict(
                "loss", f"{kind}: loss {loss:.3g}, probability {prob:.3g} over {getattr(reply, f'num_{kind}')} rows"
            )
    return Verdict("", "")


def _both(first: ClientScore, second: ClientScore | None) -> ClientScore:
    """The later answer, with the bytes of both."""
    if second is None:
        return first
    return replace(second, bytes_down=first.bytes_down + second.bytes_down, bytes_up=first.bytes_up + second.bytes_up)


def _mean(scores: Sequence[ClientScore], kind: str, number: str) -> float | None:
    counts = [getattr(score, f"num_{kind}") for score in scores]
    total = sum(counts)
    values = [getattr(score, f"{kind}_{number}") for score in scores]
    return math.fsum(n * value for n, value in zip(counts, values, strict=True)) / total if total else None
