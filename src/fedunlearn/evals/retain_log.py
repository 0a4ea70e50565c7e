"""The log of the oracle that forget_quality compares with: taken only where it speaks of the same rows in the same way."""

from fedunlearn.config.data import EvalConfig
from fedunlearn.errors import UserError
from fedunlearn.evals.sets import DataSet
from fedunlearn.metrics.tofu import FORGET_TRUTH_RATIO
from fedunlearn.records.evaluation import EvalLog, definition_of

AT = "retain_logs_path:"


def check_retain_log(log: EvalLog, forget: DataSet, settings: EvalConfig) -> None:
    """Raises UserError, all faults at once, unless the log holds forget_truth_ratio of these rows by these definitions.

    Compared: definition, forget split, hash of the forget rows and max_rows as far as the log names them (one of
    open-unlearning names none), and the number of rows. Cheap: wants no model.
    """
    ratio = log.metrics.get(FORGET_TRUTH_RATIO)
    if ratio is None or not all("score" in row for row in ratio.value_by_index):
        raise UserError(
            f"{AT} the log has no {FORGET_TRUTH_RATIO} with a score a row; evaluate the oracle again, or set it to null"
        )
    faults = [
        _definition_fault(ratio.definition, definition_of(settings.compat)),
        *_row_faults(log, forget, settings),
    ]
    found = [fault for fault in faults if fault]
    if found:
        raise UserError(*found)


def _definition_fault(theirs: str, ours: str) -> str:
    if theirs == ours:
        return ""
    fit = "eval.compat=open-unlearning" if theirs == "open-unlearning" else "eval.compat=null"
    return f"{AT} the log follows the definitions {theirs!r}, this evaluation {ours!r}; set {fit}, or evaluate the oracle anew"


def _row_faults(log: EvalLog, forget: DataSet, settings: EvalConfig) -> list[str]:
    said = log.provenance
    other_split = said.get("forget_split", forget.name)
    if other_split != forget.name:
        return [
            f"{AT} the log is of forget_split={other_split!r}, this evaluation of {forget.name!r}; give the log of the matching oracle"
        ]
    if said and said.get("max_rows") != settings.max_rows:
        return [
            f"{AT} the log was made with eval.max_rows={said.get('max_rows')}, this evaluation has {settings.max_rows}; make the two equal"
        ]
    hashes = said.get("data")
    if isinstance(hashes, dict) and hashes.get(forget.split) != forget.hash:
        return [f"{AT} the log was made on other rows of {forget.split} than these; evaluate the oracle on this data"]
    num_rows = 0 if forget.lacking else len(forget.rows)
    logged = len(log.metrics[FORGET_TRUTH_RATIO].value_by_index)
    if logged != num_rows:
        return [
            f"{AT} the log has {logged} forget rows, forget_split={forget.name!r} has {num_rows}; give the log of the oracle that "
            "belongs to it (forget01 with retain99, forget05 with retain95, forget10 with retain90)"
        ]
    return []
