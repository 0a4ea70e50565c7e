"""The ClientApp: proves itself at the roll call, then trains what a task asks for on its own rows."""

import json
import logging
from pathlib import Path

import safetensors.torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedunlearn.config.parse import parse_config
from fedunlearn.config.run import TrainRun
from fedunlearn.federation.reference_store import ReferenceStore
from fedunlearn.federation.site import VERSION, Site, set_threads
from fedunlearn.federation.wire import (
    ADAPTER,
    REFERENCE,
    REPLY,
    REQUEST,
    RollCallReply,
    TrainReply,
    TrainRequest,
    blob_of,
    pack_adapter,
    pack_scalars,
    typed_record,
    unpack_scalars,
)
from fedunlearn.training.client_update import LocalResult

log = logging.getLogger(__name__)
_sites: dict[str, Site] = {}


def make_client_app(config_json: str) -> ClientApp:
    """Gives the ClientApp of a run. The composed config is all it captures: it is pickled with every message under Ray."""
    app = ClientApp()

    @app.query()
    def roll_call(message: Message, context: Context) -> Message:
        reply = _roll_call(_site(config_json), _client_id(context))
        return Message(RecordDict({REPLY: pack_scalars(reply)}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(_train(_site(config_json), _client_id(context), message.content), reply_to=message)

    return app


def close_sites() -> None:
    """Lets go of what this process keeps for its clients, the base model included."""
    _sites.clear()


def _site(config_json: str) -> Site:
    if config_json not in _sites:
        close_sites()
        run = parse_config(json.loads(config_json))
        if not isinstance(run, TrainRun):
            raise TypeError(f"a client serves training and unlearning, not mode={run.mode!r}")
        set_threads(run)
        _sites[config_json] = Site(run)
    return _sites[config_json]


def _client_id(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _roll_call(site: Site, client: int) -> RollCallReply:
    owned = site.owned[client]
    site.encode((*owned.forget, *owned.retain))
    return RollCallReply(
        client_id=client,
        version=VERSION,
        base_fingerprint=site.made.fingerprint,
        partition_hash=site.partition.hash,
        num_owned=owned.num_owned,
        num_forget=len(owned.forget),
        num_retain=len(owned.retain),
    )


def _train(site: Site, client: int, content: RecordDict) -> RecordDict:
    request = unpack_scalars(TrainRequest, typed_record(ConfigRecord, content[REQUEST]))
    if request.client_id != client:
        raise ValueError(f"client {client} got the task of client {request.client_id}")
    sent = _blob(content, ADAPTER)
    wanted, reference = request.reference_hash, None
    if wanted:
        store = ReferenceStore(Path(site.run.paths.cache_dir) / "clients" / str(client))
        reference = store.obtain(wanted, [sent, *([_blob(content, REFERENCE)] if REFERENCE in content else [])])
        if reference is None:
            log.info("client %d lacks the reference adapter %s and asks for it", client, wanted[:12])
            return RecordDict({REPLY: pack_scalars(_reply(request, site.owned[client].num_owned, None))})
    result = site.work(request.task, site.owned[client], safetensors.torch.load(sent), reference)
    reply = _reply(request, site.owned[client].num_owned, result)
    return RecordDict({ADAPTER: pack_adapter(result.tensors), REPLY: pack_scalars(reply)})


def _blob(content: RecordDict, key: str) -> bytes:
    return blob_of(typed_record(ArrayRecord, content[key]))


def _reply(request: TrainRequest, num_owned: int, result: LocalResult | None) -> TrainReply:
    return TrainReply(
        run_id=request.run_id,
        round=request.round,
        client_id=request.client_id,
        num_examples=num_owned,
        num_trained=result.num_trained if result else 0,
        num_steps=result.num_steps if result else 0,
        num_tokens=result.num_tokens if result else 0,
        seconds=result.seconds if result else 0.0,
        loss=result.loss if result else 0.0,
        loss_trace=tuple(float(f"{loss:.6g}") for loss in result.loss_trace) if result else (),
        needs_reference=result is None,
    )
