"""Opening the benchmark that a config names."""

from pathlib import Path

from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.data.benchmark import Benchmark
from fedunlearn.data.muse import load_muse
from fedunlearn.data.own_rows import FILE, OwnTofu
from fedunlearn.data.pocket.named import named_pocket
from fedunlearn.data.tofu import Tofu, load_tofu


def open_benchmark(run: TrainRun | EvalRun) -> Benchmark:
    """Opens what muse_path or tofu_path names: a folder or a hub id; of TOFU `pocket:SEED` too. Raises UserError where it is none of these."""
    if run.muse_path is not None:
        return load_muse(run.muse_path)
    return open_tofu(str(run.tofu_path), Path(run.paths.pocket_dir))


def open_tofu(tofu_path: str, pocket_dir: Path) -> Tofu:
    """Opens `pocket:SEED` (built on first use), a folder (of all of TOFU, or of one client's own rows) or a hub id."""
    pocket = named_pocket(tofu_path, pocket_dir)
    if (Path(tofu_path) / FILE).is_file():
        return OwnTofu(tofu_path, Path(tofu_path))
    return load_tofu(tofu_path if pocket is None else str(pocket.data))
