"""A comparison of methods as text, CSV and Markdown."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedunlearn.files import write_bytes, write_json
from fedunlearn.records.comparison import FIELDS, MethodRun, Spread, Standard, Verdict, spread, verdict

HEADS = {
    "forget_prob": "forget Prob",
    "forget_quality": "forget quality",
    "truth_ratio": "truth ratio",
    "utility": "model utility",
    "rouge": "ROUGE",
    "tokens": "cost (tokens)",
    "steps": "cost (steps)",
    "seconds": "cost (seconds)",
    "wall": "seconds",
}
REFERENCES = ("fine-tuned", "retrain")
SHORT = ("method", "forget Prob", "forget quality", "model utility", "cost (tokens)", "judgement")
"""What fits a terminal."""
NOT_COUNTED = (*REFERENCES, "rollback")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One method on one request, over seeds. verdict: how it stands to the four bounds; below: whether it forgets more than the oracle."""

    name: str
    protocol: str
    settings: str
    request: int
    values: dict[str, Spread | None]
    why: str
    verdict: Verdict
    below: bool


def lines_of(runs: Sequence[MethodRun]) -> tuple[Line, ...]:
    """Gives a line for each method and request, in the order they came."""
    keys = list(dict.fromkeys((run.request, run.name) for run in runs))
    found = {
        key: [run for run in runs if (run.request, run.name) == key] for key in sorted(keys, key=lambda key: key[0])
    }
    return tuple(_line(group, _standard(runs, request)) for (request, _), group in found.items())


def _standard(runs: Sequence[MethodRun], request: int) -> Standard:
    mine = [run for run in runs if run.request == request]
    tuned, oracle = (_values([run for run in mine if run.name == name]) for name in REFERENCES)
    prob, utility = oracle["forget_prob"], tuned["utility"]
    return Standard(oracle_prob=prob.mean if prob else None, tuned_utility=utility.mean if utility else None)


def _values(runs: Sequence[MethodRun]) -> dict[str, Spread | None]:
    return {
        name: spread(
            [None if run.figures is None else getattr(run.figures, name) for run in runs],
            geometric=name == "forget_quality",
        )
        for name in FIELDS
    }


def _line(runs: Sequence[MethodRun], than: Standard) -> Line:
    first, values = runs[0], _values(runs)
    prob, oracle = values["forget_prob"], than.oracle_prob
    return Line(
        name=first.name,
        protocol=first.protocol,
        settings=first.settings,
        request=first.request,
        values=values,
        why=next((run.why for run in runs if run.why), ""),
        verdict=verdict(prob, values["forget_quality"], values["utility"], values["tokens"], than),
        below=prob is not None and oracle is not None and first.name not in REFERENCES and prob.mean < oracle,
    )


def told(lines: Sequence[Line]) -> tuple[str, ...]:
    """Gives the closing sentences of one request: how many methods meet all four bounds, and which."""
    counted = [line for line in lines if line.name not in NOT_COUNTED]
    good = [line for line in counted if line.verdict.good and not line.why]
    below = [line.name for line in counted if line.below]
    return (
        f"{len(good)} of {len(counted)} meet all of: forget Prob between 0.2 and 1.25 x the oracle's, forget quality >= 1e-2, model utility >= 0.9 x the fine-tuned "
        f"model's, cost <= 0.25 of the oracle's tokens: {', '.join(line.name for line in good) or 'none'}",
        f"forget Prob below the oracle's (overshoot, marked *): {', '.join(below) or 'none'}",
    )


def cells(line: Line) -> list[str]:
    """Gives a line's cells: what it is, its figures or why there are none, and what it fails of."""
    head = [line.name, line.protocol, *(_cell(line, name) for name in FIELDS)]
    if line.why:
        return [*head, line.settings, f"not applicable: {line.why}"]
    return [*head, line.settings, "" if line.name in REFERENCES else _judged(line.verdict)]


def _judged(found: Verdict) -> str:
    told = (("fails", found.fails), ("not known:", found.unknown))
    return "; ".join(f"{what} {', '.join(names)}" for what, names in told if names) or "meets all"


def _cell(line: Line, name: str) -> str:
    value = line.values[name]
    if value is None:
        return "–"
    if name == "forget_quality":
        return f"{value.mean:.2g}" if value.deviation == 1 else f"{value.mean:.2g} x/{value.deviation:.1f}"
    mark = "*" if name == "forget_prob" and line.below else ""
    digits = 1 if name == "wall" else 3
    return f"{value.mean:.{digits}f}{mark}" + (f" ± {value.deviation:.{digits}f}" if value.deviation else "")


def header() -> list[str]:
    """Gives the columns' names."""
    return ["method", "protocol", *(HEADS[name] for name in FIELDS), "settings", "judgement"]


def show(lines: Sequence[Line], console: Console, columns: Sequence[str] | None = None) -> None:
    """Prints the table, one a request, and the closing sentences. columns: those of header() that are shown; None: all."""
    places = [place for place, name in enumerate(header()) if columns is None or name in columns]
    for group in _by_request(lines):
        table = Table(*(header()[place] for place in places), title=f"request {group[0].request}")
        for line in group:
            row = cells(line)
            table.add_row(*(row[place] for place in places))
        console.print(table)
        for sentence in told(group):
            console.print(sentence, soft_wrap=True)


def write(runs: Sequence[MethodRun], folder: Path) -> None:
    """Writes table.txt, table.csv, table.md and rows.json (every run by itself)."""
    lines = lines_of(runs)
    text = io.StringIO()
    show(lines, Console(file=text, width=240, highlight=False))
    write_bytes(folder / "table.txt", text.getvalue().encode("utf-8"))
    write_bytes(folder / "table.md", _markdown(lines).encode("utf-8"))
    write_bytes(folder / "table.csv", _csv(lines).encode("utf-8"))
    write_json(folder / "rows.json", [asdict(run) for run in runs])


def _markdown(lines: Sequence[Line]) -> str:
    """A table and the closing sentences for each request: every one has an oracle, and so a judgement, of its own."""
    return "\n".join(_markdown_of(group) for group in _by_request(lines))


def _markdown_of(lines: Sequence[Line]) -> str:
    rows = [["request", *header()], ["---"] * (len(header()) + 1)]
    rows += [[str(line.request), *(cell.replace("|", "/") for cell in cells(line))] for line in lines]
    closing = "\n".join(told(lines))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + f"\n\n{closing}\n"


def _by_request(lines: Sequence[Line]) -> list[list[Line]]:
    return [[line for line in lines if line.request == number] for number in sorted({line.request for line in lines})]


def _csv(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["request", *header()])
    writer.writerows([line.request, *cells(line)] for line in lines)
    return text.getvalue()
