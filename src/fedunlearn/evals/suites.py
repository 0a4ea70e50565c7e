"""The data sets of an evaluation, of whichever benchmark the data are from."""

from dataclasses import dataclass

from fedunlearn.config.evaluation import EvalConfig
from fedunlearn.data.benchmark import Benchmark
from fedunlearn.data.muse import Muse
from fedunlearn.data.tofu import Tofu
from fedunlearn.errors import UserError
from fedunlearn.evals.dataset import DataSet, Sets
from fedunlearn.evals.muse_sets import FORGET_TEXTS, HOLDOUT_TEXTS, read_muse_sets
from fedunlearn.evals.retain_log import AT, check_retain_log
from fedunlearn.evals.sets import read_sets
from fedunlearn.records.evaluation import EvalLog
from fedunlearn.records.requests import Request


@dataclass(frozen=True)
class Suite:
    """sets: by the names that metrics read them under. forget: what is to be forgotten, as a retain log must have been made on it; beside: other rows that it must share.

    cuts: whether rows are cut at max_length, so that numbers depend on it.
    """

    sets: Sets
    forget: DataSet
    beside: tuple[DataSet, ...] = ()
    cuts: bool = False

    def check(self, retain_log: EvalLog | None, settings: EvalConfig, max_length: int) -> None:
        """Raises UserError where there is a retain log and it speaks of other rows, or otherwise."""
        if retain_log is None:
            return
        check_retain_log(retain_log, self.forget, settings, self.beside)
        there = retain_log.provenance.get("max_length", max_length)  # a log of open-unlearning names none
        if self.cuts and there != max_length:
            raise UserError(
                f"{AT} the log was made with max_length={there}, where texts are cut, this evaluation has {max_length}; make the two equal (max_length, in training data.max_length)"
            )


def read_suite(data: Benchmark, forget_split: str, settings: EvalConfig, request: Request | None) -> Suite:
    """Reads what settings.metrics want. request: what was asked for where that is not the split; of TOFU only.

    Raises UserError as read_sets and read_muse_sets do.
    """
    if isinstance(data, Muse):
        muse_sets = read_muse_sets(data, settings)
        beside = tuple(muse_sets[name] for name in (HOLDOUT_TEXTS,) if name in muse_sets)
        return Suite(muse_sets, muse_sets[FORGET_TEXTS], beside, cuts=True)
    if not isinstance(data, Tofu):
        raise ValueError(f"there is no evaluation of {type(data).__name__}")
    sets = read_sets(data, forget_split, settings, request)
    return Suite(sets, sets["forget"])
