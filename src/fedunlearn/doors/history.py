"""A run's history for people and for monitoring: a table on the console, a Prometheus textfile."""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedunlearn.errors import UserError
from fedunlearn.federation.checkpoint import read_history
from fedunlearn.records.rounds import RoundSeconds
from fedunlearn.reporting.prometheus import Line, outcome_of, total_bytes, write_textfile
from fedunlearn.reporting.run_folder import is_done

PARTS = tuple(vars(RoundSeconds()))


def tell_history(folder: Path, textfile: Path | None) -> None:
    """Writes the textfile where one is named, else prints a line a round. Raises UserError for a folder that holds no run, or a history of an earlier version."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{str(folder)!r} is no run's folder: name one, as in saves/<finetune|unlearn|eval>/<task_name>"
        )
    lines = read_history(folder)
    if any("parts" not in line for line in lines):
        raise UserError(
            f"the history in {str(folder)!r} is of an earlier version, without its rounds' parts: make that run anew"
        )
    if textfile is None:
        Console(highlight=False).print(history_table(lines, folder.name))
    else:
        write_textfile(textfile, lines, folder.resolve().name, is_done(folder))


def history_table(lines: list[dict[str, object]], name: str) -> Table:
    """Gives a line a round: who counted, who did not and why, MB on the wire, seconds by part, what averaging lost."""
    seconds = f"seconds: {', '.join(PARTS)}"
    table = Table("round", "counted", "did not count", "MB", seconds, "aggregation error", title=name)
    for line in lines:
        table.add_row(*_cells(line))
    return table


def _cells(line: Line) -> tuple[str, ...]:
    outcomes = Counter(outcome_of(client) for client in line["clients"])
    lost = [f"client {client['client_id']}: {client['reason']}" for client in line["clients"] if client["reason"]]
    error = line["aggregation_error"]
    return (
        str(line["round"]),
        f"{outcomes['counted']} of {len(line['clients'])}",
        "; ".join(lost),
        f"{total_bytes(line['clients']) / 1e6:.2f}",
        ", ".join(f"{line['parts'][part]:.2f}" for part in PARTS),
        "–" if error is None else f"{error:.2e}",
    )
