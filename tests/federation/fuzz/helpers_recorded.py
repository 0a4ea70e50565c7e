"""Real messages to mutate: two tiny runs over the local grid, and what the server held when it judged their last round."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from helpers_runs import tiny

from fedunlearn.data.pocket.build import PocketPaths
from fedunlearn.doors.stages import run_federated
from fedunlearn.federation import collect, rounds
from fedunlearn.federation.client_evaluation import Survey
from fedunlearn.federation.launchers import local
from fedunlearn.federation.link import Expectation, Member
from fedunlearn.federation.local_grid import SERVER_NODE, LocalGrid, SequentialGrid
from fedunlearn.federation.turn import Holds, Turn

CLIENTS = 3
BOTH = (
    f"trainer.federated.num_clients={CLIENTS}",
    "eval.clients_every_n_rounds=1",
    "eval.client_rows=2",
    "model.model_args.lora_config.r=2",
    "model.model_args.lora_config.target_modules=[q_proj,up_proj]",  # one square, one not
)
TUNED = ("aggregation=flora",)
UNLEARNED = ("aggregation=flora", "method=npo", "protocol=all_clients", "protocol.released=true")
REMEMBERED = ("method=pdu", "method.eps=1.0", "aggregation=hetlora", "partition.ranks=[2,1,1]")
MODES = {"train": "finetune", "unlearn": "unlearn"}


def node_of(client: int) -> int:
    """The node a client is reached at in a local grid."""
    return SERVER_NODE + 1 + client


class RecordingGrid(LocalGrid):
    """Keeps the last request and reply of every client by message type."""

    def __init__(self, app: ClientApp, num_clients: int) -> None:
        super().__init__(app, num_clients)
        self.asked: dict[tuple[str, int], RecordDict] = {}
        self.said: dict[tuple[str, int], RecordDict] = {}

    def _answer(self, message: Message) -> Message:
        reply = super()._answer(message)
        key = message.metadata.message_type, message.metadata.dst_node_id - SERVER_NODE - 1
        self.asked[key], self.said[key] = message.content, reply.content
        return reply


class ReplayingGrid(SequentialGrid):
    """Clients that say what `answers` makes of what they were asked: client -> (message -> reply)."""

    def __init__(self, answers: Mapping[int, Callable[[Message], Message]]) -> None:
        super().__init__(CLIENTS)
        self.answers = answers

    def _answer(self, message: Message) -> Message:
        return self.answers[message.metadata.dst_node_id - SERVER_NODE - 1](message)


@dataclass(eq=False)
class Recorded:
    """A run's last round. asked, said: contents of messages by type and client. store: what the clients kept on disk before it."""

    config: str
    folder: Path
    cache: Path
    asked: Mapping[tuple[str, int], RecordDict] = field(default_factory=dict)
    said: Mapping[tuple[str, int], RecordDict] = field(default_factory=dict)
    members: Mapping[int, Member] = field(default_factory=dict)
    expected: Expectation | None = None
    turn: Turn | None = None
    survey: Survey | None = None
    holds: Holds = field(default_factory=dict)

    @property
    def store(self) -> Path:
        """Where the clients keep parts."""
        return self.cache / "clients"

    @property
    def kept(self) -> Path:
        """A copy of what they kept before the last round's tasks came."""
        return self.cache.parent / f"kept-{self.folder.name}"

    def put_back(self) -> None:
        """Lets the clients keep what they kept."""
        shutil.rmtree(self.store, ignore_errors=True)
        shutil.copytree(self.kept, self.store)


def record(pocket: PocketPaths, saves: Path, kind: str, task: str, *overrides: str) -> Recorded:
    """Makes a run by launcher=local and keeps its last round: messages, and what the server took turn and survey with."""
    composed = tiny(pocket, saves, kind, task, *BOTH, *overrides)
    made = Recorded(
        json.dumps(composed.plain, sort_keys=True), saves / MODES[composed.run.mode] / task, saves / "cache"
    )
    grids = []

    class Grid(RecordingGrid):
        def __init__(self, app, num_clients):
            super().__init__(app, num_clients)
            grids.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "LocalGrid", Grid)
        _keep_what_the_server_holds(made, patch)
        run_federated(composed)
    made.asked, made.said = grids[0].asked, grids[0].said
    return made


def _keep_what_the_server_holds(made: Recorded, patch: pytest.MonkeyPatch) -> None:
    turn, survey, call = collect.take_turn, rounds.take_survey, rounds.roll_call

    def take_turn(grid, members, asked, holds, spool):
        made.members, made.turn, made.holds = members, asked, holds
        shutil.rmtree(made.kept, ignore_errors=True)
        made.store.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made.store, made.kept)
        return turn(grid, members, asked, holds, spool)

    def take_survey(grid, members, asked):
        made.survey = asked
        return survey(grid, members, asked)

    def roll_call(grid, expected, *rest):
        made.expected = expected
        return call(grid, expected, *rest)

    patch.setattr(collect, "take_turn", take_turn)
    patch.setattr(rounds, "take_survey", take_survey)
    patch.setattr(rounds, "roll_call", roll_call)


def alone(recorded: Recorded, kind: str, client: int, content: RecordDict) -> Message:
    """A message to one client as the server would send it."""
    message = Message(content, node_of(client), kind, group_id="1")
    message.metadata.__dict__["_message_id"] = "asked"
    return message


def whole(turn: Turn) -> Turn:
    """The same turn, which does not wait."""
    return replace(turn, timeout=60.0)


KINDS = (MessageType.TRAIN, MessageType.EVALUATE, MessageType.QUERY)
