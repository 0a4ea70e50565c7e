"""What a probe found, as one table: every model and metric a row, every attack a column."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedunlearn.config.probe import MEASURED, TRAINING, UTILITY
from fedunlearn.files import write_bytes
from fedunlearn.metrics.resilience import casting, relearning, robustness
from fedunlearn.records.probe import Leak, Probed, Subject

SHORT = {
    "forget_Q_A_Prob": "Prob",
    "forget_Q_A_PARA_Prob": "paraphrase Prob",
    "forget_Q_A_ROUGE": "ROUGE",
    "extraction_strength": "extraction",
    "exact_memorization": "memorization",
}
NARROW = {
    "relearn_forget": "R re-\nlearnt",
    "relearn_unrelated": "R other\ntext",
    "rounds": "R\nrounds",
    "bfloat16": "Q\nbf16",
    "int8": "Q\nint8",
    "nf4": "Q\nnf4",
}
RELEARN, WEIGHTS = "relearn_forget", "nf4"
WIDTH = 160


def score(subject: Subject, oracle: Subject, attack: str, metric: str) -> float | None:
    """R for attacks that train, Q for casts; None where a figure is missing."""
    before, after = subject.before[metric], subject.after[attack][metric]
    start, end = oracle.before[metric], oracle.after[attack][metric]
    if before is None or after is None or start is None or end is None:
        return None
    return relearning(before, after, start, end) if attack in TRAINING else casting(before, after)


def overall(subject: Subject, oracle: Subject, metric: str) -> float | None:
    """HM of R by relearning on the forget rows and Q by 4-bit weights; None where one of the two was not asked for."""
    if not {RELEARN, WEIGHTS} <= set(subject.after):
        return None
    r, q = (score(subject, oracle, attack, metric) for attack in (RELEARN, WEIGHTS))
    return None if r is None or q is None else robustness(r, q)


def rows_of(found: Probed) -> list[list[str]]:
    """The table's rows, its head first."""
    oracle = found.subjects[0]
    attacks = list(oracle.after)
    rows = [
        [
            "model",
            "utility",
            "metric",
            "before",
            *(f"{a} ({'R' if a in TRAINING else 'Q'})" for a in attacks),
            "robustness",
        ]
    ]
    for subject in found.subjects:
        for metric in MEASURED:
            cells = [_cell(subject, oracle, attack, metric) for attack in attacks]
            name = subject.name + ("*" if subject.below else "")
            utility = _number(subject.before[UTILITY])
            last = _number(overall(subject, oracle, metric))
            rows.append([name, utility, SHORT[metric], _number(subject.before[metric]), *cells, last])
    return rows


def _cell(subject: Subject, oracle: Subject, attack: str, metric: str) -> str:
    return f"{_number(subject.after[attack][metric])} ({_number(score(subject, oracle, attack, metric))})"


def leaks_of(found: Probed) -> list[list[str]]:
    """The table of differences, its head first; empty where none was asked for."""
    if not found.leaks:
        return []
    head = ["difference of", "rows", "base", "base - U", "base + U", "leak"]
    return [head, *(row for leak in found.leaks for row in _leak_rows(leak))]


def _leak_rows(leak: Leak) -> list[list[str]]:
    kinds = {"forget": "forget_Q_A_Prob", "retain": "retain_Q_A_Prob"}
    return [
        [
            leak.name,
            kind,
            *(_number(side[metric]) for side in (leak.base, leak.minus, leak.plus)),
            f"{leak.of(metric):+.3f}",
        ]
        for kind, metric in kinds.items()
    ]


def notes_of(found: Probed) -> list[str]:
    """What a reader must know beside the table."""
    notes = []
    below = [subject.name for subject in found.subjects if subject.below]
    if below:
        notes.append(
            f"* starts below the oracle's forget Prob, so that relearning has further to go and R flatters or hurts it: {', '.join(below)}"
        )
    return notes


def probe_json(found: Probed) -> dict[str, object]:
    """Everything that was measured, and the scores."""
    oracle = found.subjects[0]
    subjects = {
        subject.name: {
            "before": dict(subject.before),
            "after": {attack: dict(figures) for attack, figures in subject.after.items()},
            "below_the_oracle": subject.below,
            "scores": {a: {m: score(subject, oracle, a, m) for m in MEASURED} for a in subject.after},
            "robustness": {m: overall(subject, oracle, m) for m in MEASURED},
        }
        for subject in found.subjects
    }
    leaks: Mapping[str, object] = {
        leak.name: {
            "base": dict(leak.base),
            "minus": dict(leak.minus),
            "plus": dict(leak.plus),
            "leak": {metric: leak.of(metric) for metric in leak.base},
        }
        for leak in found.leaks
    }
    return {"subjects": subjects, "difference": leaks}


def write_tables(found: Probed, folder: Path) -> None:
    """Leaves table.txt, table.md and table.csv in the folder."""
    text, sheet = io.StringIO(), io.StringIO()
    show_probe(found, Console(file=text, width=WIDTH, highlight=False), whole=True)
    tables = [rows for rows in (rows_of(found), leaks_of(found)) if rows]
    for rows in tables:
        csv.writer(sheet).writerows(rows)
    write_bytes(folder / "table.txt", text.getvalue().encode("utf-8"))
    write_bytes(folder / "table.md", "\n\n".join([*map(_markdown, tables), *notes_of(found), ""]).encode("utf-8"))
    write_bytes(folder / "table.csv", sheet.getvalue().encode("utf-8"))


def show_probe(found: Probed, console: Console, whole: bool = False) -> None:
    """Prints the tables and the notes. whole: every metric; else forget Prob alone, as narrow as a terminal is."""
    for rows in (rows_of(found) if whole else _narrow(found), leaks_of(found)):
        if rows:
            table = Table(*rows[0])
            for row in rows[1:]:
                table.add_row(*row)
            console.print(table)
    for note in notes_of(found):
        console.print(note, soft_wrap=True)


def _narrow(found: Probed) -> list[list[str]]:
    """Forget Prob before, R or Q by it after each attack."""
    oracle, metric = found.subjects[0], MEASURED[0]
    rows = [["model", "util.", "Prob", *(NARROW[attack] for attack in oracle.after), "HM"]]
    for one in found.subjects:
        scores = [_number(score(one, oracle, attack, metric), 2) for attack in oracle.after]
        rows.append(
            [
                one.name + ("*" if one.below else ""),
                _number(one.before[UTILITY], 2),
                _number(one.before[metric], 2),
                *scores,
                _number(overall(one, oracle, metric), 2),
            ]
        )
    return rows


def _markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join([_line(head), _line(["---"] * len(head)), *map(_line, body)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
