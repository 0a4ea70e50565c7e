"""The log of the oracle that metrics compare with: taken only where it speaks of the same rows in the same way."""

from collections.abc import Sequence

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.errors import UserError
from fedunlearn.evals.dataset import DataSet
from fedunlearn.metrics.base import LogReading
from fedunlearn.records.evaluation import THEIRS, EvalLog, MetricResult

AT = "retain_logs_path:"


def check_retain_log(log: EvalLog, forget: DataSet, settings: EvalConfig, beside: Sequence[DataSet] = ()) -> None:
    """Raises UserError, all faults at once, unless the log holds what settings.metrics read of it, of these rows and by these definitions.

    Compared: definitions, forget split, question_key, hash of the forget rows and max_rows as far as the log names them (one of
    open-unlearning names none), and the number of rows; of data sets beside the forget rows the hash. Cheap: wants no model.
    """
    read = [(name, one.reads_log) for name, one in settings.metrics.items() if one.reads_log is not None]
    lacking = [_lacking(log, name, reading) for name, reading in read]
    faults = [fault for fault in lacking if fault]
    if not faults:
        faults = [
            fault
            for _, reading in read
            if (fault := _definition_fault(log.metrics[reading.metric], reading.metric, settings))
        ]
        faults += _row_faults(log, (forget, *beside), settings, [reading.metric for _, reading in read if reading.rows])
    if faults:
        raise UserError(*dict.fromkeys(faults))


def _lacking(log: EvalLog, name: str, reading: LogReading) -> str:
    found = log.metrics.get(reading.metric)
    way_out = f"evaluate the oracle again with it, take {name} out (~eval.metrics.{name}), or set it to null"
    if found is None:
        return f"{AT} the log has no {reading.metric}, which {name} compares with; {way_out}"
    if reading.rows and not all(isinstance(row.get("score"), float) for row in found.value_by_index):
        return f"{AT} the log has no {reading.metric} with a score a row, which {name} compares with; {way_out}"
    if not reading.rows and (found.agg_value is None or not 0 <= found.agg_value <= 1):
        return (
            f"{AT} the log has {reading.metric}={found.agg_value}, where {name} wants an AUC between 0 and 1; {way_out}"
        )
    return ""


def _definition_fault(logged: MetricResult, name: str, settings: EvalConfig) -> str:
    theirs, ours = logged.definition, settings.metrics[name].definition(settings.compat)
    if theirs == ours:
        return ""
    fit = "eval.compat=open-unlearning" if theirs.startswith(THEIRS) else "eval.compat=null"
    return f"{AT} the log follows the definitions {theirs!r} of {name}, this evaluation {ours!r}; set {fit} (and the metric's form as it was), or evaluate the oracle anew"


def _row_faults(log: EvalLog, sets: Sequence[DataSet], settings: EvalConfig, compared: list[str]) -> list[str]:
    said, forget = log.provenance, sets[0]
    other_split = said.get("forget_split", forget.name)
    if other_split != forget.name:
        return [
            f"{AT} the log is of forget_split={other_split!r}, this evaluation of {forget.name!r}; give the log of the matching oracle"
        ]
    for key, value in (("max_rows", settings.max_rows), ("question_key", settings.question_key)):
        if said and said.get(key, "question" if key == "question_key" else None) != value:
            return [
                f"{AT} the log was made with eval.{key}={said.get(key)}, this evaluation has {value}; make the two equal"
            ]
    hashes = said.get("data")
    if said and not isinstance(hashes, dict):
        return [f"{AT} the log does not say which rows it was made on (provenance.data); evaluate the oracle again"]
    other = [data for data in sets if isinstance(hashes, dict) and hashes.get(data.split) != data.hash]
    if other:
        return [f"{AT} the log was made on other rows of {other[0].split} than these; evaluate the oracle on this data"]
    num_rows = 0 if forget.lacking else forget.num_rows
    for name in compared:
        logged = len(log.metrics[name].value_by_index)
        if logged != num_rows:
            return [
                f"{AT} the log has {logged} forget rows, forget_split={forget.name!r} has {num_rows}; give the log of the oracle that "
                "belongs to it (forget01 with retain99, forget05 with retain95, forget10 with retain90)"
            ]
    return []
