"""The ClientApp: proves itself at the roll call, then trains what a task asks for on its own rows."""

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedunlearn.aggregation.factors import side_by_side
from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.errors import UserError
from fedunlearn.federation.part_store import PartStore, joined
from fedunlearn.federation.site import VERSION, OwnScores, Site, set_threads
from fedunlearn.federation.wire import (
    ADAPTER,
    PART,
    RELEASED,
    REPLY,
    REQUEST,
    EvaluateReply,
    EvaluateRequest,
    RollCallReply,
    TrainReply,
    TrainRequest,
    WireError,
    blob_of,
    pack_adapter,
    pack_scalars,
    typed_record,
    unpack_released,
    unpack_scalars,
)
from fedunlearn.records.adapter import Tensors, Weights
from fedunlearn.records.requests import ReleasedRow
from fedunlearn.training.charges import charges_of
from fedunlearn.training.local import LocalResult

log = logging.getLogger(__name__)
_sites: dict[tuple[str, int | None], Site] = {}


def make_client_app(config_json: str, max_steps: int | None = None) -> ClientApp:
    """Gives the ClientApp of a run. The composed config is all it captures: it is pickled with every message under Ray.

    max_steps: optimiser steps that a task may ask for at most.
    """
    app = ClientApp()

    @app.query()
    def roll_call(message: Message, context: Context) -> Message:
        reply = _roll_call(_site(config_json, max_steps), _client_id(context))
        return Message(RecordDict({REPLY: pack_scalars(reply)}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(_train(_site(config_json, max_steps), _client_id(context), message.content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(_evaluate(_site(config_json, max_steps), _client_id(context), message.content), reply_to=message)

    return app


def close_sites() -> None:
    """Lets go of what this process keeps for its clients, the base model included."""
    _sites.clear()


def _site(config_json: str, max_steps: int | None) -> Site:
    key = (config_json, max_steps)
    if key not in _sites:
        close_sites()
        run = parse_config(json.loads(config_json))
        if not isinstance(run, TrainRun):
            raise TypeError(f"a client serves training and unlearning, not mode={run.mode!r}")
        set_threads(run)
        _sites[key] = Site(run, max_steps)
    return _sites[key]


def _client_id(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _roll_call(site: Site, client: int) -> RollCallReply:
    if client >= site.partition.num_clients:
        raise UserError(
            f"the run has clients 0 to {site.partition.num_clients - 1} only: correct this node's client_id"
        )
    site.check_able()
    rows, shape = site.counted(client), site.shapes[client]
    return RollCallReply(
        client_id=client,
        version=VERSION,
        base_fingerprint=site.made.fingerprint,
        quantization=site.made.quantization,
        layout=site.start.layout,
        partition_hash=site.partition.hash,
        request_hash=site.request.hash,
        num_owned=rows.num_owned,
        num_forget=rows.num_forget,
        num_retain=rows.num_retain,
        rank=shape.rank,
        lora_alpha=shape.lora_alpha,
        joins=site.run.partition.joins_at(client),
    )


def _train(site: Site, client: int, content: RecordDict) -> RecordDict:
    request = unpack_scalars(TrainRequest, typed_record(ConfigRecord, content.get(REQUEST)))
    request.check()
    if request.client_id != client:
        raise ValueError(f"client {client} got the task of client {request.client_id}")
    loading = _load(site)
    wanted = (*request.adapter, *request.sidecar, *request.reference, *request.reference_sidecar)
    parts, missing = _obtained(site, client, content, wanted, request.keep)
    if missing:
        log.info("client %d lacks %d parts of its task and asks for them", client, len(missing))
        return RecordDict({REPLY: pack_scalars(_reply(site, request, None, missing))})
    start = Weights(joined(request.adapter, parts), _beside(site, request.sidecar, parts))
    beside = _beside(site, request.reference_sidecar, parts)
    reference = Weights(joined(request.reference, parts), beside) if request.reference else None
    released = _released(site, content)
    charges = charges_of(Path(site.run.paths.cache_dir), request.run_id, client, request.round)
    result = site.work(request.task, site.owned[client], start, reference, charges, released)
    return RecordDict(
        {ADAPTER: pack_adapter(result.tensors), REPLY: pack_scalars(_reply(site, request, result, loading=loading))}
    )


def _load(site: Site) -> float:
    """Makes sure that the model is there; gives the seconds that loading it took, 0 where it was there already."""
    if "made" in vars(site):
        return 0.0
    began = time.monotonic()
    site.made  # noqa: B018
    return time.monotonic() - began


def _evaluate(site: Site, client: int, content: RecordDict) -> RecordDict:
    request = unpack_scalars(EvaluateRequest, typed_record(ConfigRecord, content.get(REQUEST)))
    request.check()
    if request.client_id != client:
        raise ValueError(f"client {client} got the evaluation of client {request.client_id}")
    parts, missing = _obtained(site, client, content, (*request.adapter, *request.sidecar), request.keep)
    said = OwnScores()
    if not missing:
        adapter = Weights(joined(request.adapter, parts), _beside(site, request.sidecar, parts))
        said = site.scores(client, adapter, request.rows or None, request.seed)
    reply = EvaluateReply(
        run_id=request.run_id,
        round=request.round,
        client_id=client,
        base_fingerprint=site.made.fingerprint,
        missing=missing,
        **asdict(said),
    )
    return RecordDict({REPLY: pack_scalars(reply)})


def _obtained(
    site: Site, client: int, content: RecordDict, wanted: tuple[str, ...], keep: tuple[str, ...]
) -> tuple[dict[str, Tensors], tuple[str, ...]]:
    """Gives the wanted parts, from the message or from what this client keeps, and the hashes of those that it lacks."""
    store = PartStore(Path(site.run.paths.cache_dir) / "clients" / str(client))
    received = {key.removeprefix(PART): _blob(content, key) for key in content if key.startswith(PART)}
    return store.obtain(wanted, received, keep)


def _beside(site: Site, names: Sequence[str], parts: Mapping[str, Tensors]) -> Tensors:
    """Gives the side-car of these blocks. Raises WireError where one stands there more often than rounds can have made it: names are short, and blocks long."""
    most = max(Counter(names).values(), default=0)
    if most > site.run.total_rounds + 1:
        raise WireError("unreadable", f"a side-car block {most} times, in a run of {site.run.total_rounds} rounds")
    return side_by_side([parts[name] for name in names])


def _released(site: Site, content: RecordDict) -> tuple[ReleasedRow, ...]:
    """Gives the rows of others that came with a task. Raises WireError where the run's protocol sends none."""
    if RELEASED not in content:
        return ()
    if not site.run.protocol.releases:
        raise WireError("unreadable", "released rows, in a run whose protocol releases none")
    return unpack_released(typed_record(ConfigRecord, content[RELEASED]))


def _blob(content: RecordDict, key: str) -> bytes:
    return blob_of(typed_record(ArrayRecord, content[key]))


def _reply(
    site: Site,
    request: TrainRequest,
    result: LocalResult | None,
    missing: tuple[str, ...] = (),
    loading: float = 0.0,
) -> TrainReply:
    return TrainReply(
        run_id=request.run_id,
        round=request.round,
        client_id=request.client_id,
        base_fingerprint=site.made.fingerprint,
        num_examples=site.counted(request.client_id).num_owned,
        num_trained=result.num_trained if result else 0,
        num_steps=result.num_steps if result else 0,
        num_tokens=result.num_tokens if result else 0,
        num_reference_tokens=result.num_reference_tokens if result else 0,
        seconds=result.seconds if result else 0.0,
        seconds_loading=loading,
        loss=result.loss if result else 0.0,
        loss_trace=tuple(float(f"{loss:.6g}") for loss in result.loss_trace) if result else (),
        memory=dict(result.memory) if result else {},
        stopped=result.stopped if result else "",
        missing=missing,
    )
