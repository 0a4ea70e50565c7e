"""How far two runs' results are apart: for the benchmarks, and for the tests that compare a real federation with launcher=local."""

import math
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from fedunlearn.models.adapter_files import WEIGHTS


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference of two runs' adapters; infinite where names or shapes differ, one cannot be read, or a difference is no number."""
    try:
        mine, its = (load_file(folder / "adapter" / WEIGHTS) for folder in (one, other))
    except (OSError, SafetensorError):
        return math.inf
    if {name: t.shape for name, t in mine.items()} != {name: t.shape for name, t in its.items()}:
        return math.inf
    apart = [float((mine[name] - its[name]).abs().max()) for name in mine]
    return math.inf if any(map(math.isnan, apart)) else max(apart)
