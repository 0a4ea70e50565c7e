"""A Flower Grid in this process: the ClientApp is called directly, one client after another, in the order asked."""

import logging
import time
from collections import OrderedDict
from collections.abc import Iterable
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedunlearn.errors import UserError

log = logging.getLogger(__name__)
RUN_ID = 1
SERVER_NODE = 1
CLIENT_RAISED = 1001


class LocalGrid(Grid):
    """Runs `client_app` for `num_clients` nodes; node k has partition-id k, as in Flower's simulation engine.

    A pushed message waits until it is pulled and is worked on then, one a pull: there is never more than one reply in memory.
    A client that raises gives an error reply, as over the wire; its traceback goes to the log.
    """

    def __init__(self, client_app: ClientApp, num_clients: int) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1
        self._app = client_app
        self._run = Run.create_empty(RUN_ID)
        self._waiting: OrderedDict[str, Message] = OrderedDict()
        self._contexts = {
            node: Context(
                RUN_ID, node, {"partition-id": node - SERVER_NODE - 1, "num-partitions": num_clients}, RecordDict(), {}
            )
            for node in range(SERVER_NODE + 1, SERVER_NODE + 1 + num_clients)
        }

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
        return list(self._contexts)

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
        wanted = set(message_ids)
        chosen = next((key for key in self._waiting if key in wanted), None)
        return [] if chosen is None else [self._call(self._waiting.pop(chosen))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Works on all messages in turn; after `timeout` seconds the rest is left. A call under way is not interrupted."""
        pushed = list(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while len(replies) < len(pushed) and (end is None or time.monotonic() < end):
            replies.extend(self.pull_messages(pushed))
        return replies

    def _call(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except UserError as error:
            return Message(Error(CLIENT_RAISED, str(error)), reply_to=message)
        except Exception as error:
            log.exception("a client raised while it worked on a %s message", message.metadata.message_type)
            return Message(Error(CLIENT_RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
