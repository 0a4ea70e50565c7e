"""Grids that work on one client after another, in the order asked; the one of this process calls the ClientApp directly."""

import logging
import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Set
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedunlearn.errors import UserError
from fedunlearn.federation.faults import CLIENT_RAISED, REPLY_UNREADABLE

log = logging.getLogger(__name__)
RUN_ID = 1
SERVER_NODE = 1


class SequentialGrid(Grid):
    """A Grid of `num_clients` nodes of which one works at a time; node k has partition-id k, as in Flower's simulation engine.

    A pushed message waits until it is pulled and is worked on then, one a pull: there is never more than one reply in memory.
    A client that fails in whatever way gives an error reply, as over the wire.
    """

    def __init__(self, num_clients: int) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1
        self._run = Run.create_empty(RUN_ID)
        self._waiting: OrderedDict[str, Message] = OrderedDict()
        self._nodes = _nodes(num_clients)

    @abstractmethod
    def _answer(self, message: Message) -> Message:
        """Gives the reply of the node that the message is for. Never raises for what a client does."""

    def set_run(self, run: Run) -> None:
        """Sets the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Gives a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, in client order."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keeps the messages until their replies are pulled."""
        pushed = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            self._waiting[message.metadata.message_id] = message
            pushed.append(message.metadata.message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Works on the first waiting message of those named and gives its reply; an empty list when none waits."""
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        chosen = next((key for key in self._waiting if key in wanted), None)
        return [] if chosen is None else [self._answer(self._waiting.pop(chosen))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Works on all messages in turn; after `timeout` seconds the rest is left. A call under way is not interrupted."""
        pushed = list(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while len(replies) < len(pushed) and (end is None or time.monotonic() < end):
            replies.extend(self.pull_messages(pushed))
        return replies


class LocalGrid(SequentialGrid):
    """Calls `client_app` in this process. The traceback of a client that raises goes to the log; one that hangs or dies takes this process with it."""

    def __init__(self, client_app: ClientApp, num_clients: int) -> None:
        super().__init__(num_clients)
        self._app = client_app

    def _answer(self, message: Message) -> Message:
        context = context_of(message.metadata.dst_node_id, len(self._nodes))
        return call_client(self._app, context, message)


def call_client(app: ClientApp, context: Context, message: Message) -> Message:
    """Gives a node's reply to a message, or an error reply where it raised or gave no reply to this message."""
    try:
        reply: object = app(message, context)
    except UserError as error:
        return Message(Error(CLIENT_RAISED, str(error)), reply_to=message)
    except Exception as error:
        log.exception("a client raised while it worked on a %s message", message.metadata.message_type)
        return Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
    if isinstance(reply, Message) and reply.metadata.reply_to_message_id == message.metadata.message_id:
        return reply
    return Message(
        Error(REPLY_UNREADABLE, f"a {type(reply).__name__} that does not answer the message"), reply_to=message
    )


def context_of(node: int, num_clients: int) -> Context:
    """Gives a node's Context, made for one message and let go of with its reply: over the wire it may be a new process each time."""
    client = _nodes(num_clients).index(node)
    return Context(RUN_ID, node, {"partition-id": client, "num-partitions": num_clients}, RecordDict(), {})


def _nodes(num_clients: int) -> range:
    return range(SERVER_NODE + 1, SERVER_NODE + 1 + num_clients)
