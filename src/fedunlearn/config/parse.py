"""Composed YAML, as a plain dict, into the frozen records of a run: strict, and every fault told at once."""

from collections.abc import Mapping
from typing import cast

from fedunlearn.config.lora import REFUSED as LORA_REFUSED
from fedunlearn.config.lora import LoraArgs
from fedunlearn.config.parallel import REFUSED as PARALLEL_REFUSED
from fedunlearn.config.parallel import ParallelArgs
from fedunlearn.config.probe import ProbeRun
from fedunlearn.config.reading import MISSING, Reader
from fedunlearn.config.refused import REFUSED
from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.config.trainer import TrainArgs
from fedunlearn.errors import UserError, did_you_mean

RUN_OF_MODE: Mapping[str, type[TrainRun] | type[EvalRun]] = {
    "train": TrainRun,
    "unlearn": TrainRun,
    "eval": EvalRun,
    "probe": ProbeRun,
}


def parse_config(data: Mapping[str, object]) -> TrainRun | EvalRun:
    """Gives the record of a run, by `mode`.

    data: plain dicts, lists and scalars, resolved; the text `???` counts as a key that is missing. Numbers may be given as
    whole numbers or as text (`1e-5`) where a float is wanted. A record's own rules run once its fields are read.
    Raises UserError with every fault there is.
    """
    mode = data.get("mode", MISSING)
    if not isinstance(mode, str) or mode not in RUN_OF_MODE:
        near = did_you_mean(str(mode), RUN_OF_MODE)
        raise UserError(
            f"mode={mode!r} is unknown{near} Known: {', '.join(RUN_OF_MODE)} (the file named by --config-name sets it)"
        )
    reader = Reader({TrainArgs: REFUSED, LoraArgs: LORA_REFUSED, ParallelArgs: PARALLEL_REFUSED})
    run = reader.record(RUN_OF_MODE[mode], data, "")
    if reader.faults:
        raise UserError(*reader.faults)
    return cast("TrainRun | EvalRun", run)
