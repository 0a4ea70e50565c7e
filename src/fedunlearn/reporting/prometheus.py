"""A run's history as a Prometheus textfile, for node_exporter's textfile collector: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedunlearn.files import write_bytes

PREFIX = "fedunlearn_"
DIRECTIONS = ("down", "down_reference", "up")
Line = Mapping[str, Any]
"""One object of history.jsonl (records.rounds.RoundResult)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One metric. samples: its values by their labels beside `run`."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    samples: Sequence[tuple[Mapping[str, str], float]]


def write_textfile(path: Path, lines: Sequence[Line], run: str, finished: bool) -> None:
    """Writes what a history says in one rename, as the collector wants it. run: the label that all values carry. Raises UserError where it cannot be written."""
    write_bytes(path, textfile(lines, run, finished).encode("utf-8"))


def textfile(lines: Sequence[Line], run: str, finished: bool) -> str:
    """Gives the text: totals over all rounds, and gauges of the last one. No time stamps: the collector gives them."""
    families = [
        Family(name="rounds_total", kind="counter", help="Rounds on record.", samples=[({}, len(lines))]),
        Family(name="finished", kind="gauge", help="1 where the run came to its end.", samples=[({}, float(finished))]),
        *_totals(lines),
        *(_of_the_last(lines[-1]) if lines else ()),
        _evaluations(lines),
    ]
    return "".join(_written(family, run) for family in families if family.samples)


def outcome_of(client: Mapping[str, Any]) -> str:
    """Names what became of a client in a round: counted, idle, dropped (its reason says why), or unweighted where nothing was given to what it sent."""
    if client["reason"]:
        return "dropped"
    if client["role"] == "idle":
        return "idle"
    return "counted" if client["weight"] else "unweighted"


def _totals(lines: Sequence[Line]) -> tuple[Family, ...]:
    seconds, sent, dropped = Counter[str](), Counter[str](dict.fromkeys(DIRECTIONS, 0)), Counter[str]()
    for line in lines:
        seconds.update(line["parts"])
        for client in line["clients"]:
            sent.update({way: client[f"bytes_{way}"] for way in DIRECTIONS})
            dropped.update([client["reason"]] if client["reason"] else [])
    return (
        Family(
            name="seconds_total",
            kind="counter",
            help="Wall clock of all rounds, by part.",
            samples=_by("part", seconds),
        ),
        Family(
            name="bytes_total",
            kind="counter",
            help="Bytes of all messages of all rounds.",
            samples=_by("direction", sent),
        ),
        Family(
            name="dropped_total", kind="counter", help="Replies that did not count.", samples=_by("reason", dropped)
        ),
    )


def _of_the_last(line: Line) -> tuple[Family, ...]:
    clients = line["clients"]
    outcomes = Counter(outcome_of(client) for client in clients)
    weights = {str(client["client_id"]): client["weight"] for client in clients}
    norms = {str(client["client_id"]): client["update_norm"] for client in clients}
    return (
        _last("round_seconds", "Wall clock of the last round, by part.", _by("part", line["parts"])),
        _last("clients", "Clients of the last round.", _by("outcome", outcomes)),
        _last("client_weight", "Share in the mean of the last round.", _by("client", weights)),
        _last("client_update_norm", "Norm of the change a client sent in the last round.", _by("client", norms)),
        _last(
            "aggregation_error",
            "What averaging lost of the exact product in the last round.",
            _by("", {"": line["aggregation_error"]}),
        ),
        _last("metric", "Metrics of the last round.", _by("name", line["metrics"])),
    )


def _evaluations(lines: Sequence[Line]) -> Family:
    """The newest of each figure: not every round is evaluated."""
    newest: dict[tuple[str, str], float] = {}
    for line in lines:
        for by, figures in (("server", line["evaluation"]), ("clients", (line["by_clients"] or {}).get("figures", {}))):
            newest.update({(by, name): figure for name, figure in figures.items() if figure is not None})
    samples = [({"by": by, "name": name}, figure) for (by, name), figure in sorted(newest.items())]
    return _last("evaluation", "Newest figures of the global adapter, by whom it was evaluated.", samples)


def _last(name: str, help: str, samples: Sequence[tuple[Mapping[str, str], float]]) -> Family:
    return Family(name=name, kind="gauge", help=help, samples=samples)


def _by(label: str, values: Mapping[str, float | None]) -> list[tuple[Mapping[str, str], float]]:
    """A sample a value that is there."""
    return [({label: key} if label else {}, value) for key, value in sorted(values.items()) if value is not None]


def _written(family: Family, run: str) -> str:
    name = PREFIX + family.name
    head = f"# HELP {name} {family.help}\n# TYPE {name} {family.kind}\n"
    return head + "".join(f"{name}{_labels({'run': run, **labels})} {value!r}\n" for labels, value in family.samples)


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def total_bytes(clients: Iterable[Mapping[str, Any]]) -> int:
    """Gives the bytes of all messages of a round, both ways."""
    return sum(client[f"bytes_{way}"] for client in clients for way in DIRECTIONS)
