"""Rounds of one of Flower's own strategies, without a run: its configure_train and aggregate_train are called directly."""

from collections.abc import Iterator
from contextlib import contextmanager

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity


class Nodes:
    """As much of a Grid as configure_train asks for: node k + 1 is client k."""

    def __init__(self, num_clients):
        self._nodes = list(range(1, num_clients + 1))

    def get_node_ids(self):
        return self._nodes


@contextmanager
def task_identity() -> Iterator[None]:
    """Lets a Message be made outside a run; what was set before is put back."""
    names = ("_run_id", "_node_id", "_task_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    try:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def flower_rounds(strategy, start, train, num_examples, num_rounds):
    """Gives the global arrays after each round.

    start: name -> float32 array. train(client, round, global arrays) gives the client's arrays. num_examples: one a client.
    """
    arrays, results = record(start), []
    with task_identity():
        for number in range(1, num_rounds + 1):
            asked = strategy.configure_train(number, arrays, ConfigRecord(), Nodes(len(num_examples)))
            replies = [reply(message, number, train, num_examples) for message in sorted(asked, key=node)]
            arrays, _ = strategy.aggregate_train(number, replies)
            results.append({name: array.numpy() for name, array in arrays.items()})
    return results


def record(arrays):
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def node(message):
    """In client order, for Flower draws the nodes in a random one and sums in the order of the replies."""
    return message.metadata.dst_node_id


def reply(message, number, train, num_examples):
    client = node(message) - 1
    sent = {name: array.numpy() for name, array in message.content["arrays"].items()}
    metrics = MetricRecord({"num-examples": num_examples[client]})
    content = RecordDict({"arrays": record(train(client, number, sent)), "metrics": metrics})
    return Message(content, reply_to=message)
