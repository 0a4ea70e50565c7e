"""`adapter.py card`: an adapter's README.md, of what lies in its folder and in its run's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedunlearn.doors.adapter_named import read_adapter
from fedunlearn.errors import UserError
from fedunlearn.evals.files import MUSE_FILES, TOFU_FILES, read_log
from fedunlearn.files import read_object, write_bytes
from fedunlearn.models.source import run_of
from fedunlearn.records.adapter import Adapter
from fedunlearn.reporting.model_card import Card, card_text
from fedunlearn.reporting.run_folder import DONE, PACKAGES, versions

README = "README.md"


@dataclass(frozen=True, kw_only=True)
class CardWritten:
    """Where the card lies, the run it tells of, and how many metrics it holds."""

    file: str
    run: str | None
    metrics: int


def write_card(adapter: Path, to: Path | None, overwrite: bool) -> CardWritten:
    """Writes the card. to: README.md in the adapter's folder where None. Raises UserError where the file is there and may not be replaced."""
    folder, found = read_adapter(adapter)
    file = folder / README if to is None else to.expanduser()
    if file.is_dir():
        raise UserError(f"--to {str(to)!r} is a folder: name a file, as in {str(file / README)!r}")
    if file.exists() and not overwrite:
        raise UserError(f"{str(file)!r} is there already: name another file with --to, or give --overwrite")
    run = run_of(folder)
    card = _card(folder, found, run)
    write_bytes(file, card_text(card).encode("utf-8"))
    return CardWritten(file=str(file), run=None if run is None else str(run), metrics=len(card.metrics))


def _card(folder: Path, adapter: Adapter, run: Path | None) -> Card:
    """What is known. Figures of an evaluation are the run's result's, so a round's card has none."""
    result = run is not None and folder.resolve() == (run / "adapter").resolve()
    provenance = {} if run is None else _object(run / "provenance.json")
    return Card(
        name=folder.parent.name if result else folder.name,
        adapter=adapter,
        run={} if run is None else _object(run / "config.json"),
        versions=provenance.get("versions")
        or versions([name for name in PACKAGES if name in ("fedunlearn", "torch", "transformers", "peft")]),
        git_commit=provenance.get("git_commit"),
        hashes=provenance.get("hashes", {}),
        account=_object(run / DONE).get("account", {}) if run is not None and result and (run / DONE).is_file() else {},
        metrics=_metrics(run) if run is not None and result else {},
    )


def _metrics(run: Path) -> Mapping[str, float]:
    for files in (TOFU_FILES, MUSE_FILES):
        if (run / files.evaluation).is_file():
            found = {name: metric.agg_value for name, metric in read_log(run, files).metrics.items()}
            return {name: value for name, value in found.items() if value is not None}
    return {}


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{str(path)!r} of the adapter's run cannot be read ({error}): copy the run's folder again, or the adapter alone out of it"
        ) from error
