"""Whether a run on disk may stand for the one that a config asks for: the same config, made from the same adapter, partition and retain log."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.data.ownership import FILE as PARTITION
from fedunlearn.data.ownership import read_partition
from fedunlearn.doors.compose import ComposedConfig
from fedunlearn.errors import UserError
from fedunlearn.evals.files import FILES_OF, log_file, read_log
from fedunlearn.files import read_object
from fedunlearn.models.adapter_files import saved_hash
from fedunlearn.models.source import resolve_source
from fedunlearn.reporting.run_folder import changed_keys, is_done, run_path


def is_same(composed: ComposedConfig) -> bool:
    """Whether the very run that is asked for lies in its folder and is done. Raises UserError where what it is made from is missing or damaged."""
    folder = run_path(composed.run)
    return is_done(folder) and _began_alike(folder, composed) and _judged_alike(folder, composed.run)


def how_to_begin(composed: ComposedConfig) -> tuple[str, ...]:
    """Gives the override for a folder that may be there: go on with what was begun alike, else begin in its place."""
    folder = run_path(composed.run)
    if not folder.is_dir():
        return ()
    goes_on = not is_done(folder) and _began_alike(folder, composed)
    return ("resume=true",) if goes_on else ("overwrite=true",)


def _began_alike(folder: Path, composed: ComposedConfig) -> bool:
    """Whether a run there has the same config, adapter and partition. Paths in a config say nothing of what lies behind them."""
    config, hashes = _object(folder / "config.json"), _object(folder / "provenance.json").get("hashes")
    if changed_keys(config, composed.plain) or not isinstance(hashes, Mapping):
        return False
    run = composed.run
    source = resolve_source(run.model.model_args, Path(run.paths.pocket_dir), fetch=False)
    if hashes.get("source") != saved_hash(source.adapter):
        return False
    dealt = _partition_of(run, source.run)
    return dealt is None or hashes.get("partition") == read_partition(dealt).hash


def _partition_of(run: TrainRun | EvalRun, source: Path | None) -> Path | None:
    """The file that a run's partition comes from; None where it deals the rows itself, and for an evaluation."""
    if isinstance(run, EvalRun):
        return None
    path = source if run.partition.path is None else Path(run.partition.path)
    return path / PARTITION if path is not None and path.is_dir() else path


def _judged_alike(folder: Path, run: TrainRun | EvalRun) -> bool:
    """Whether its evaluation, where there is one, was held against the same log, byte by byte."""
    if isinstance(run, TrainRun) and not run.eval.at_end:
        return True
    wanted, files = None, FILES_OF[run.eval.name]
    if run.retain_logs_path is not None:
        wanted = hashlib.sha256(log_file(Path(run.retain_logs_path), files).read_bytes()).hexdigest()
    try:
        return read_log(folder, files).provenance.get("retain_log") == wanted
    except UserError:
        return False


def _object(path: Path) -> Mapping[str, object]:
    """A JSON object; empty where it is missing or damaged: such a run is not gone on with."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}
