"""A Flower strategy of the user's inside our round loop: it says whom to train and what to make of the updates, and nothing else.

Selection, gate, messages, checkpoints and history stay ours: the strategy sees the clients that were selected, and updates that
have passed the gate. It never gets a Grid that can send.
"""

import copy
import importlib
import logging
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.run import Run

from fedunlearn.aggregation.flower import FIXED, FlowerStrategy, constructor_parameters
from fedunlearn.aggregation.reduce import ReadTensor
from fedunlearn.errors import UserError
from fedunlearn.records.adapter import Tensors
from fedunlearn.seeds import seed_of

log = logging.getLogger(__name__)
SERVER_ROUND, MU = "server-round", "proximal-mu"
WEIGHT, LOSS = str(FIXED["weighted_by_key"]), str(FIXED["train_loss_key"])
PATIENCE = 10.0  # seconds; a strategy that then asks for nodes once more is waiting for some that will not come
_DTYPES = frozenset(map(np.dtype, ("bool", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8")))
_NOT_COPIED = object()
_IDENTITY: object = object.__eq__  # what a class has that defines no equality


@dataclass(frozen=True, kw_only=True)
class StrategyState:
    """What a strategy keeps from round to round: arrays for safetensors, how they hang together for JSON.

    arrays: by flat name, dtypes as the strategy has them. kinds: attribute -> how it is put together again, in lists, so that
    JSON keeps the order of keys. unsaved: attributes that have changed and hold something else; such a run cannot be resumed.
    """

    arrays: Tensors = field(default_factory=dict)
    kinds: Mapping[str, object] = field(default_factory=dict)
    unsaved: tuple[str, ...] = ()


class WrappedStrategy:
    """One Flower strategy for one run, built by `build`.

    A round is `configure`, then `aggregate`, in this order and once each: most strategies remember the arrays they saw. Both
    need Flower's TaskIdentity (a run, or a LocalGrid, sets it). While the strategy works, the global random numbers of Python,
    NumPy and torch are a function of (seed, round), and are as before afterwards. Whatever it raises becomes a UserError.
    """

    def __init__(self, strategy: Strategy, target: str, seed: int) -> None:
        self._strategy, self._seed = strategy, seed
        self._said = f"strategy._target_={target!r}"
        self._at_start = {name: self._copied(value) for name, value in vars(strategy).items()}

    @classmethod
    def build(cls, record: FlowerStrategy, seed: int = 0) -> "WrappedStrategy":
        """Builds the strategy, and keeps Flower's log to warnings.

        What `FIXED` names is passed where the constructor takes it, so that the strategy takes all clients it is shown and
        waits for no others. seed: the run's. Raises UserError where the class cannot be built or is no Strategy.
        """
        flower_log = logging.getLogger("flwr")
        flower_log.setLevel(max(flower_log.level, logging.WARNING))
        said = f"strategy._target_={record.target!r}"
        module, _, name = record.target.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
            known = constructor_parameters(found)
            fixed = {name: value for name, value in FIXED.items() if name in known}
            with _random_numbers_of(seed_of("strategy", seed)):
                strategy = found(**copy.deepcopy(dict(record.parameters)), **fixed)
        except Exception as error:
            raise UserError(
                f"{said} cannot be built ({type(error).__name__}: {error}): correct strategy.* or choose another strategy"
            ) from error
        if not isinstance(strategy, Strategy):
            raise UserError(f"{said} is no Flower strategy: make it a subclass of flwr.serverapp.strategy.Strategy")
        return cls(strategy, record.target, seed)

    def configure(self, round: int, adapter: Tensors, nodes: Mapping[int, int]) -> Mapping[int, float]:
        """Gives the proximal mu of every client that the strategy wants trained, in client-id order.

        adapter: the global one; the strategy sees it as float32. nodes: client id -> node id of the clients selected. It may
        leave clients out. Raises UserError where it asks for what we would not do: other nodes, other arrays, another message
        type, config keys that our clients do not know.
        """
        offered = _array_record(adapter)
        sent = {name: array.data for name, array in offered.items()}
        grid = OfferedNodes([nodes[client] for client in sorted(nodes)])
        with self._at_work(round, "configure_train"):
            messages = list(self._strategy.configure_train(round, offered, ConfigRecord(), grid))
        clients = {node: client for client, node in nodes.items()}
        wanted: dict[int, float] = {}
        for message in messages:
            client = self._client(round, message, clients)
            if client in wanted:
                raise self._fault(round, f"it asks client {client} twice; one message a client and round is sent")
            wanted[client] = self._mu(round, message.content, sent)
        if not wanted:
            raise self._fault(round, f"it wants none of the {len(nodes)} selected clients trained")
        if len(wanted) < len(nodes):
            log.info("round %d: %s wants clients %s of %s", round, self._said, sorted(wanted), sorted(nodes))
        return {client: wanted[client] for client in sorted(wanted)}

    def aggregate(
        self,
        round: int,
        weights: Mapping[int, float],
        nodes: Mapping[int, int],
        read: ReadTensor,
        adapter: Tensors,
        losses: Mapping[int, float] | None = None,
    ) -> Tensors:
        """Gives the new global adapter, float64 by name, from one reply a client, in client-id order.

        weights: client id -> p_k (sum 1), the replies' `num-examples`; Flower's strategies take floats. read: gives one tensor
        of one client, in the adapter's names; all clients' are in memory at once. losses: the replies' `train_loss`, which
        QFedAvg asks for. Raises UserError naming the first tensor that is missing, of another shape or not finite.
        """
        replies = []
        for client in sorted(weights):
            metrics = MetricRecord({WEIGHT: float(weights[client])})
            if losses is not None:
                metrics[LOSS] = float(losses[client])
            arrays = _array_record({name: read(client, name) for name in adapter})
            asked = Message(RecordDict(), nodes[client], MessageType.TRAIN, group_id=str(round))
            replies.append(Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=asked))
        with self._at_work(round, "aggregate_train"):
            result, _ = self._strategy.aggregate_train(round, replies)
        return self._checked(round, result, adapter)

    def state(self) -> StrategyState:
        """Gives what the strategy keeps now: attributes that are None, arrays, ArrayRecords, or dicts and lists of those."""
        arrays: dict[str, torch.Tensor] = {}
        kinds: dict[str, object] = {}
        changed = set(self._at_start) - set(vars(self._strategy))
        for name, value in vars(self._strategy).items():
            own: dict[str, torch.Tensor] = {}
            try:
                kinds[name] = _pack(value, name, own)
                arrays |= own
            except TypeError:
                if name not in self._at_start or not _same(value, self._at_start[name]):
                    changed.add(name)
        return StrategyState(arrays=arrays, kinds=kinds, unsaved=tuple(sorted(changed)))

    def restore(self, state: StrategyState) -> None:
        """Puts a state of the same strategy back, types and dtypes as they were. Raises UserError where it does not fit or is not whole."""
        if state.unsaved:
            raise UserError(
                f"{self._said} cannot be resumed: it changes {', '.join(state.unsaved)}, of which checkpoints keep no copy (they "
                "keep arrays, ArrayRecords, lists and dicts of those): start anew with overwrite=true"
            )
        try:
            values = {name: _unpack(cast("list[Any]", node), state.arrays) for name, node in state.kinds.items()}
            for name, value in values.items():
                setattr(self._strategy, name, value)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._said}: its saved state does not fit ({type(error).__name__}: {error}): it is of another strategy or "
                "version; start anew with overwrite=true"
            ) from error

    def _fault(self, round: int, what: str) -> UserError:
        return UserError(
            f"{self._said}, round {round}: {what}. Correct the strategy or its parameters, or choose another"
        )

    @contextmanager
    def _at_work(self, round: int, step: str) -> Iterator[None]:
        with _random_numbers_of(seed_of("strategy", self._seed, round, step)):
            try:
                yield
            except Exception as error:
                raise self._fault(round, f"{step} raised {type(error).__name__}: {error}") from error

    def _copied(self, value: object) -> object:
        """A deep copy to compare with later; what cannot be copied counts as changed, for nobody can tell."""
        try:
            return copy.deepcopy(value, {id(self._strategy): self._strategy})
        except Exception:
            return _NOT_COPIED

    def _client(self, round: int, message: Message, clients: Mapping[int, int]) -> int:
        if not isinstance(message, Message) or not message.has_content():
            raise self._fault(round, f"configure_train gives a {type(message).__name__} where messages are wanted")
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        if kind != MessageType.TRAIN:
            raise self._fault(round, f"it sends a message of type {kind!r}; allowed: {MessageType.TRAIN!r}")
        if node not in clients:
            raise self._fault(round, f"it asks node {node}, which is none of the {len(clients)} selected")
        return clients[node]

    def _mu(self, round: int, content: RecordDict, sent: Mapping[str, bytes]) -> float:
        """The mu that a message's config holds; its arrays must be those that all clients get."""
        mu: object = 0.0
        for key, record in content.items():
            if isinstance(record, ArrayRecord):
                self._check_sent(round, record, sent)
            elif isinstance(record, ConfigRecord):
                unknown = sorted(set(record) - {SERVER_ROUND, MU})
                if unknown:
                    known = f"{SERVER_ROUND!r} and {MU!r}"
                    raise self._fault(round, f"it sends the config key {unknown[0]!r}; our clients know {known} only")
                mu = record.get(MU, mu)
            else:
                raise self._fault(round, f"it sends a {type(record).__name__} {key!r}; our clients read none")
        if isinstance(mu, bool) or not isinstance(mu, int | float) or not (math.isfinite(mu) and mu >= 0):
            raise self._fault(round, f"it sends {MU}={mu!r}; allowed: a finite number, 0 or above")
        return float(mu)

    def _check_sent(self, round: int, record: ArrayRecord, sent: Mapping[str, bytes]) -> None:
        names = sorted(set(sent) | set(record))
        other = [name for name in names if name not in record or record[name].data != sent.get(name)]
        if other:
            raise self._fault(round, f"it sends another {other[0]!r} than the global adapter's, which all clients get")

    def _checked(self, round: int, result: ArrayRecord | None, adapter: Tensors) -> Tensors:
        if not isinstance(result, ArrayRecord):
            raise self._fault(
                round, f"aggregate_train gives {'no' if result is None else type(result).__name__} arrays"
            )
        odd = sorted(set(result) ^ set(adapter))
        if odd:
            raise self._fault(
                round, f"its result {'lacks' if odd[0] in adapter else 'has an unknown'} tensor {odd[0]!r}"
            )
        return {name: self._tensor(round, name, result[name], adapter[name]) for name in sorted(adapter)}

    def _tensor(self, round: int, name: str, array: Array, like: torch.Tensor) -> torch.Tensor:
        try:
            values = array.numpy()
        except (TypeError, ValueError, OSError, EOFError) as error:
            raise self._fault(round, f"its tensor {name!r} cannot be read ({error})") from error
        if values.dtype.kind not in "fiu":
            raise self._fault(round, f"its tensor {name!r} has dtype {values.dtype}; allowed: real numbers")
        if values.shape != tuple(like.shape):
            raise self._fault(round, f"its tensor {name!r} has shape {values.shape} instead of {tuple(like.shape)}")
        if not np.isfinite(values).all():
            raise self._fault(round, f"its tensor {name!r} has entries that are not finite")
        return torch.from_numpy(values.astype(np.float64))


class OfferedNodes(Grid):
    """The Grid a strategy is shown: it knows the nodes of this round's clients, and sends nothing."""

    def __init__(self, nodes: Iterable[int]) -> None:
        self._nodes, self._began = tuple(nodes), time.monotonic()

    def get_node_ids(self) -> Iterable[int]:
        """The nodes, in client order. Raises UserError once a strategy has waited too long for more."""
        if time.monotonic() - self._began > PATIENCE:
            raise UserError(
                f"it waits for more nodes than the {len(self._nodes)} selected: raise trainer.federated.min_clients, or let its "
                "constructor take min_train_nodes and min_available_nodes"
            )
        return list(self._nodes)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Gives a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        """Refused."""
        self._refuse("set_run")

    @property
    def run(self) -> Run:
        """Refused."""
        self._refuse("run")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Refused."""
        self._refuse("push_messages")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Refused."""
        self._refuse("pull_messages")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Refused."""
        self._refuse("send_and_receive")

    def _refuse(self, name: str) -> NoReturn:
        raise UserError(
            f"grid.{name} is not a strategy's to use here: give messages back from configure_train, we send them"
        )


@contextmanager
def _random_numbers_of(seed: int) -> Iterator[None]:
    """Within, the global generators begin at `seed`; afterwards they are as they were: no draw of ours hangs on them."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _array_record(tensors: Tensors) -> ArrayRecord:
    """In name order; bfloat16 and float16 as float32, which NumPy and Flower know."""
    return ArrayRecord({name: Array(tensors[name].detach().cpu().float().numpy()) for name in sorted(tensors)})


def _pack(value: object, name: str, arrays: dict[str, torch.Tensor]) -> list[object]:
    """Gives how `value` is put together and adds its arrays, copied, as `name`, `name/0`, ...; TypeError where it holds anything else."""
    if value is None:
        return ["none"]
    if type(value) is np.ndarray and value.dtype in _DTYPES:
        arrays[name] = torch.from_numpy(np.array(value, order="C"))
        return ["ndarray", name]
    if type(value) is list:
        return ["list", [_pack(item, f"{name}/{index}", arrays) for index, item in enumerate(value)]]
    if type(value) is ArrayRecord:
        return ["ArrayRecord", _pack({key: array.numpy() for key, array in value.items()}, name, arrays)]
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return ["dict", [[key, _pack(item, f"{name}/{i}", arrays)] for i, (key, item) in enumerate(value.items())]]
    raise TypeError(f"{name} holds a {type(value).__name__}")


def _unpack(node: list[Any], arrays: Tensors) -> object:
    """Puts together what `_pack` took apart."""
    kind, *rest = node
    if kind == "none":
        return None
    if kind == "ndarray":
        return np.array(arrays[rest[0]].numpy())
    if kind == "list":
        return [_unpack(item, arrays) for item in rest[0]]
    if kind == "ArrayRecord":
        return ArrayRecord({key: Array(value) for key, value in cast("Any", _unpack(rest[0], arrays)).items()})
    if kind == "dict":
        return {key: _unpack(item, arrays) for key, item in rest[0]}
    raise ValueError(f"unknown kind {kind!r}")


def _same(one: Any, other: Any) -> bool:
    """Whether two objects are equal all the way down; what cannot be compared is not."""
    try:
        return one is other or (type(one) is type(other) and _equal(one, other))
    except Exception:
        return False


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if type(one).__eq__ is not _IDENTITY:
        return bool(one == other)
    return _same(one.__reduce_ex__(4), other.__reduce_ex__(4))  # what pickle and copy see: class and attributes
