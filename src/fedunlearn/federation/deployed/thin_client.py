"""The ClientApp that a SuperNode starts for every message: it hands the message to the node's worker and keeps the time.

It imports no torch: Flower starts a process a message, and a second of imports would be paid in every round.
"""

import logging
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedunlearn.config.sites import ClientSite, read_site
from fedunlearn.errors import UserError
from fedunlearn.federation.deployed.brief import unpack_brief
from fedunlearn.federation.deployed.enrolment import Enrolment, enrol, enrolment_of
from fedunlearn.federation.deployed.frames import Frame, FrameError, pack_content, unpack_content
from fedunlearn.federation.deployed.keeper import GoneError, Keeper, LateError
from fedunlearn.federation.faults import CLIENT_DIED, CLIENT_RAISED, CLIENT_TIMEOUT, REPLY_UNREADABLE

log = logging.getLogger(__name__)
SITE, SUPERNODE = "site", "supernode-pid"
app = ClientApp()


@app.query()
def roll_call(message: Message, context: Context) -> Message:
    """Writes the run down on this node and answers who it is."""
    return _answer("query", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains on this node's rows."""
    return _answer("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Scores an adapter on this node's rows."""
    return _answer("evaluate", message, context)


def _answer(kind: str, message: Message, context: Context) -> Message:
    """Gives the worker's reply, or an error reply that says in words what was in its way. Never raises: Flower keeps no reason of what is raised."""
    who = ""
    try:
        site_path = _site_path(context)
        site = read_site(site_path, ClientSite)
        who = f"client {site.client_id}: " if kind == "query" else ""  # in a round the server knows whom it asked
        enrolment = _enrolled(kind, site, context.run_id, message)
        keeper = Keeper(
            site=site,
            site_path=site_path,
            key=enrolment.worker_key,
            base=Path(enrolment.read_config()["model"]["model_args"]["pretrained_model_name_or_path"]),
            supernode=int(context.node_config[SUPERNODE]),
        )
        return Message(_ask(keeper, enrolment, kind, message), reply_to=message)
    except _RefusedError as fault:
        return _error(message, fault.code, f"{who}{fault}")
    except (UserError, ValueError) as fault:
        return _error(message, CLIENT_RAISED, f"{who}{fault}")
    except LateError as fault:
        return _error(message, CLIENT_TIMEOUT, f"{who}{fault}")
    except GoneError as fault:
        return _error(message, CLIENT_DIED, f"{who}{fault}")
    except Exception as fault:
        log.exception("a %s message could not be answered", kind)
        return _error(message, CLIENT_RAISED, f"{who}{type(fault).__name__}: {fault}")


class _RefusedError(Exception):
    """The worker answered with a fault. code: of fedunlearn.federation.faults."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def _site_path(context: Context) -> Path:
    named = context.node_config.get(SITE)
    if not isinstance(named, str):
        raise UserError(
            "this SuperNode was started without its site YAML: start it with scripts/supernode.py SITE.yaml"
        )
    return Path(named)


def _enrolled(kind: str, site: ClientSite, run_id: int, message: Message) -> Enrolment:
    if kind == "query":
        return enrol(site, run_id, unpack_brief(message.content))
    enrolment = enrolment_of(site, run_id)
    if not enrolment.exists:
        raise UserError(f"this node did not answer the roll call of run {run_id}: it cannot take part in its rounds")
    return enrolment


def _ask(keeper: Keeper, enrolment: Enrolment, kind: str, message: Message) -> RecordDict:
    content, blobs = pack_content(message.content) if kind != "query" else ({}, [])
    head = {"do": "answer", "folder": enrolment.folder.name, "kind": kind, "content": content}
    answer = keeper.ask(Frame(head, blobs), keeper.site.policy.max_task_seconds)
    if "error" in answer.head:
        code, reason = answer.head["error"]
        raise _RefusedError(int(code), str(reason))
    try:
        return unpack_content(answer.head.get("content"), answer.blobs)
    except FrameError as fault:
        raise _RefusedError(REPLY_UNREADABLE, str(fault)) from fault


def _error(message: Message, code: int, reason: str) -> Message:
    log.error("refused: %s", reason)
    return Message(Error(code, "; ".join(reason.splitlines())), reply_to=message)  # the server reads one line
