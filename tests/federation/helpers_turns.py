"""A federation without models: clients that answer as a test says, asked by the server's own turn and collect."""

import math
from dataclasses import replace

import safetensors.torch
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedunlearn.federation.block_store import BlockStore
from fedunlearn.federation.collect import Call
from fedunlearn.federation.link import Member, rows_of
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.federation.parts import Depot
from fedunlearn.federation.planning import Planner
from fedunlearn.federation.spool import open_spool
from fedunlearn.federation.wire import (
    ADAPTER,
    REPLY,
    REQUEST,
    RollCallReply,
    TrainReply,
    TrainRequest,
    pack_adapter,
    pack_scalars,
    unpack_scalars,
)

MODULE = "base_model.model.layer"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
OWNED = 20
FIRST_NODE = 2


def start():
    """The global adapter of every test: B A = 1 in each of 4 x 3 entries, scale 1."""
    return {A: torch.full((2, 3), 0.5), B: torch.ones(4, 2)}


def with_trainer(run, **federated):
    """The run with other numbers in trainer.federated."""
    return replace(run, trainer=replace(run.trainer, federated=replace(run.trainer.federated, **federated)))


def good_reply(request, **changes):
    """What an honest client says beside its adapter."""
    said = TrainReply(
        run_id=request.run_id,
        round=request.round,
        client_id=request.client_id,
        base_fingerprint="base",
        num_examples=OWNED,
        num_trained=OWNED,
        num_steps=3,
        num_tokens=99,
        num_reference_tokens=0,
        seconds=0.1,
        seconds_loading=0.0,
        loss=1.0,
        loss_trace=(1.0,),
        memory={},
        stopped="",
        missing=(),
    )
    return replace(said, **changes)


def good(request, by=0.1):
    """An honest client's answer: it adds `by` to every entry of B."""
    moved = {A: start()[A], B: start()[B] + by}
    return RecordDict({ADAPTER: pack_adapter(moved), REPLY: pack_scalars(good_reply(request))})


class Federation:
    """Clients 0 .. count-1, of which `answers` says what each gives: client -> (request -> RecordDict, or raises); others are honest.

    asked: client ids in the order in which they were asked.
    """

    def __init__(self, run, folder, count, answers=None, owners=()):
        self.run, self.folder, self.asked, self.answers = run, folder, [], answers or {}
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            request = unpack_scalars(TrainRequest, message.content[REQUEST])
            self.asked.append(request.client_id)
            answer = self.answers.get(request.client_id, good)
            return Message(answer(request), reply_to=message)

        self.grid = LocalGrid(app, count)
        self.members = {k: _member(k, forget=4 if k in owners else 0) for k in range(count)}
        self.depot = Depot(
            adapter=start(),
            blocks=(),
            start=start(),
            start_blocks=(),
            store=BlockStore(folder / "sidecar"),
            scales={"layer": 1.0},
            halves=False,
            dtype=torch.float32,
        )

    @property
    def call(self):
        """What collect takes."""
        return Call(
            grid=self.grid,
            run=self.run,
            run_id="run",
            base_fingerprint="base",
            members=self.members,
            planner=Planner(self.run, rows_of(self.members)),
            shapes={},
            depot=self.depot,
            reads_reference=False,
        )

    def spool(self):
        """An empty spool in this federation's folder."""
        return open_spool(self.folder)


def _member(client, forget):
    declared = RollCallReply(
        client_id=client,
        version="1",
        base_fingerprint="base",
        partition_hash="p",
        request_hash="r",
        num_owned=OWNED,
        num_forget=forget,
        num_retain=OWNED - forget,
        rank=2,
        lora_alpha=2.0,
        joins=1,
    )
    return Member(node_id=FIRST_NODE + client, declared=declared, bytes_up=0)


def norm_of(by):
    """||B' A - B A|| of a client that adds `by` to every entry of B: each of 4 x 3 entries moves by 2 * by * 0.5."""
    return math.sqrt(12) * by


def tensors_of(blob):
    """A spooled blob's tensors."""
    return safetensors.torch.load(blob)
