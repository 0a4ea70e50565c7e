"""The same faults through Flower's own FedAvg: aggregate_train on seven replies, as Strategy.start calls it, and what becomes of the global model.

A client that never answers is left out here; Strategy.start would wait an hour for it first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedunlearn.aggregation.factors import A
from fedunlearn.federation.faults import CLIENT_DIED, CLIENT_RAISED, CLIENT_TIMEOUT
from fedunlearn.federation.local_grid import SERVER_NODE

from .recording import NUM_CLIENTS, Recorded
from .replay import SILENT, learnt

FAULTY = 2
Arrays = dict[str, np.ndarray]
CLOSE = 1e-4
NOTHING = "-"
"""Where Flower has no such thing: no roll call, no JSON, no safetensors, no parts."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Said:
    """One client's reply, in Flower's terms. start: the global model it trained from."""

    start: Arrays
    arrays: Arrays
    metrics: dict[str, float]

    def content(self, arrays: Arrays | None = None, **metrics: float) -> RecordDict:
        """The reply with other arrays or metrics."""
        record = ArrayRecord({name: Array(np.ascontiguousarray(v)) for name, v in (arrays or self.arrays).items()})
        return RecordDict({"arrays": record, "metrics": MetricRecord({**self.metrics, **metrics})})

    def first(self, change: Callable[[np.ndarray], np.ndarray]) -> RecordDict:
        """The reply with its first array changed."""
        name = min(self.arrays)
        return self.content({**self.arrays, name: change(self.arrays[name])})

    def every(self, change: Callable[[np.ndarray], np.ndarray]) -> RecordDict:
        """The reply with every array changed."""
        return self.content({name: change(values) for name, values in self.arrays.items()})

    def moved(self, times: float) -> RecordDict:
        """The reply with its update multiplied."""
        return self.content(
            {name: self.start[name] + times * (v - self.start[name]) for name, v in self.arrays.items()}
        )

    def in_gauge(self, times: float) -> RecordDict:
        """The same product with other factors."""
        return self.content(
            {name: v * np.float32(times if A in name else 1 / times) for name, v in self.arrays.items()}
        )

    def with_bytes(self, data: bytes) -> RecordDict:
        """The reply with other bytes for its first array."""
        content, name = self.content(), min(self.arrays)
        honest = content["arrays"][name]
        content["arrays"][name] = Array(honest.dtype, honest.shape, honest.stype, data)
        return content

    def lying(self) -> RecordDict:
        """The reply with a NumPy header that says more than there is."""
        content, name = self.content(), min(self.arrays)
        shape = str(self.arrays[name].shape).encode()
        return self.with_bytes(content["arrays"][name].data.replace(shape, b"(9999, 9999)"))


def _entry(value: float) -> Callable[[Said], RecordDict]:
    def change(values: np.ndarray) -> np.ndarray:
        spoilt = values.copy()
        spoilt.flat[-1] = value
        return spoilt

    return lambda said: said.first(change)


def _swapped(said: Said) -> RecordDict:
    honest = said.content()
    return RecordDict({"arrays": honest["metrics"], "metrics": honest["arrays"]})


def _with_record(said: Said) -> RecordDict:
    return RecordDict({**said.content(), "more": MetricRecord({"accuracy": 1.0})})


_STOCK: Mapping[str, Callable[[Said], RecordDict | Error]] = {
    "NaN": _entry(float("nan")),
    "inf": _entry(float("inf")),
    "a (1, d) array": lambda said: said.first(lambda v: v[:1]),
    "wrong shape": lambda said: said.first(lambda v: np.concatenate([v, v])),
    "transposed": lambda said: said.every(lambda v: v.T),
    "missing key": lambda said: said.content({k: v for k, v in said.arrays.items() if k != min(said.arrays)}),
    "extra key": lambda said: said.content({**said.arrays, "base.weight": np.zeros((2, 3), np.float32)}),
    "no tensors": lambda said: RecordDict({**said.content(), "arrays": ArrayRecord()}),
    "float16": lambda said: said.every(lambda v: v.astype(np.float16)),
    "float64": lambda said: said.every(lambda v: v.astype(np.float64)),
    "int": lambda said: said.every(lambda v: (100 * v).astype(np.int32)),
    "num-examples 1e12": lambda said: said.content(**{"num-examples": 10**12}),
    "num-examples -59": lambda said: said.content(**{"num-examples": -59}),
    "num-examples NaN": lambda said: said.content(**{"num-examples": float("nan")}),
    "zero update": lambda said: said.moved(0.0),
    "update 1e6 times too large": lambda said: said.moved(1e6),
    "A a million times B": lambda said: said.in_gauge(1e6),
    "B a million times A": lambda said: said.in_gauge(1e-6),
    "largest float32": lambda said: said.every(lambda v: np.full_like(v, np.finfo(v.dtype).max)),
    "raises": lambda said: Error(CLIENT_RAISED, "RuntimeError"),
    "hangs, is ended": lambda said: Error(CLIENT_TIMEOUT, ""),
    "hangs, no reply": lambda said: Error(SILENT, ""),
    "dies": lambda said: Error(CLIENT_DIED, ""),
    "no safetensors": lambda said: said.with_bytes(b"all your base" * 1000),
    "no bytes": lambda said: said.with_bytes(b""),
    "ten times the size": lambda said: said.first(lambda v: np.concatenate([v] * 100)),
    "header: shape of 2^62": Said.lying,
    "loss 1e308": lambda said: said.content(train_loss=1e308),
    "loss NaN": lambda said: said.content(train_loss=float("nan")),
    "extra metric": lambda said: said.content(accuracy=1.0),
    "extra MetricRecord": _with_record,
    "empty message": lambda said: RecordDict(),
    "records swapped": _swapped,
    "no adapter": lambda said: RecordDict({"metrics": said.content()["metrics"]}),
    "no reply beside": lambda said: RecordDict({"arrays": said.content()["arrays"]}),
    "metric beside the JSON": lambda said: RecordDict({**said.content(), "more": ConfigRecord({"accuracy": 1.0})}),
    # Flower's messages hold no round, run, client or base: such a reply is a sound one to it
    "another round": Said.content,
    "another run": Said.content,
    "another client's id": Said.content,
    "another base": Said.content,
    "roll call: 1e12 rows": lambda said: said.content(**{"num-examples": 10**12}),
    "roll call: 0 rows": lambda said: said.content(**{"num-examples": 0}),
    "roll call: -59 rows": lambda said: said.content(**{"num-examples": -59}),
}  # fmt: skip


class Stock:
    """Judges what FedAvg makes of each fault beside the exact means of six and of seven."""

    def __init__(self, recorded: Recorded) -> None:
        self._start = {name: t.numpy() for name, t in recorded.start.tensors.items()}
        self._said = {
            client: Said(
                start=self._start,
                arrays={n: t.numpy() for n, t in learnt(recorded.start.tensors, recorded.deltas[client]).items()},
                metrics={
                    "num-examples": recorded.declared[client].num_owned,
                    "train_loss": recorded.said[client].loss,
                },
            )
            for client in range(NUM_CLIENTS)
        }

    def becomes(self, fault: str) -> str:
        """In a few words, what the global model becomes; `-` where Flower has no such thing."""
        if fault not in _STOCK:
            return NOTHING
        replies = []
        for client, said in self._said.items():
            answer = _STOCK[fault](said) if client == FAULTY else said.content()
            if not (isinstance(answer, Error) and answer.code == SILENT):
                asked = Message(RecordDict(), SERVER_NODE + 1 + client, MessageType.TRAIN, group_id="1")
                replies.append(Message(answer, reply_to=asked))
        try:
            with np.errstate(all="ignore"):
                arrays, metrics = FedAvg().aggregate_train(1, replies)
        except Exception as error:
            return f"ends the run: {type(error).__name__}"
        assert arrays is not None
        return self._told({name: array.numpy() for name, array in arrays.items()}) + _odd(metrics)

    def _told(self, got: Arrays) -> str:
        if any(got[name].shape != values.shape for name, values in self._start.items()):
            return "another shape for all"
        bad = sum(not np.isfinite(values).all() for values in got.values())
        if bad:
            return f"not finite: {bad} of {len(got)} tensors"
        if self._apart(got, self._mean(without=FAULTY)) < CLOSE:
            return "left out"
        if self._apart(got, self._mean()) < CLOSE:
            return "counts as sound"
        if self._apart(got, self._said[FAULTY].arrays) < CLOSE:
            return "takes over the model"
        return f"counts: {self._apart(got, self._mean()):.2g} honest steps off"

    def _mean(self, without: int | None = None) -> Arrays:
        said = [one for client, one in self._said.items() if client != without]
        total = sum(one.metrics["num-examples"] for one in said)
        return {
            name: sum(one.metrics["num-examples"] / total * one.arrays[name].astype(np.float64) for one in said)
            for name in self._start
        }

    def _apart(self, got: Arrays, want: Arrays) -> float:
        """The distance in steps that seven honest clients make."""
        step = _norm({name: values - self._start[name] for name, values in self._mean().items()})
        return _norm({name: got[name].astype(np.float64) - want[name] for name in want}) / step


def _norm(arrays: Arrays) -> float:
    return float(sum(np.square(values.astype(np.float64)).sum() for values in arrays.values()) ** 0.5)


def _odd(metrics: MetricRecord | None) -> str:
    loss = None if metrics is None else metrics.get("train_loss")
    return "" if loss is None or (isinstance(loss, float) and abs(loss) < 1e15) else f"; train_loss {loss:.3g}"
