"""One matrix of one cohort, for benchmarks/aggregation.py: what each preset costs on it, and the dense float64 way to the same result."""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fedunlearn.aggregation.gauges.base import Gauge
from fedunlearn.aggregation.gauges.procrustes import Procrustes, nearest_rotation
from fedunlearn.aggregation.gauges.reset import Reset
from fedunlearn.aggregation.gauges.svd import Balanced, Orthonormal
from fedunlearn.aggregation.product import LowRank, truncated_svd, weighted_sum
from fedunlearn.aggregation.reduce import Choices, Cohort, Reduced, reduce_round
from fedunlearn.aggregation.reducers.best_rank import BestRank
from fedunlearn.aggregation.reducers.factor_mean import FactorMean, PaddedFactorMean
from fedunlearn.aggregation.reducers.stack import Stack
from fedunlearn.aggregation.reducers.trimmed_mean import TrimmedMean
from fedunlearn.aggregation.robust.geometric_median import GeometricMedian
from fedunlearn.aggregation.robust.off import Off
from fedunlearn.records.rounds import Trained

SCALE = 2.0
TRIM, SOFTNESS = 0.25, 0.5

# Sums and products of factors in float64: some thousand roundings of 1e-16, which do not all add up.
MEAN_BOUND = 1e-12
# Singular vectors add what a rounding does across the gap S_r / S_{r+1}, here above 10.
SVD_BOUND = 1e-10
# A side-car block is cast to float32: 2**-24 in each of its factors.
BLOCK_BOUND = 1e-6

PRESETS: dict[str, tuple[Choices, Trained, float]] = {
    name: (Choices(reducer=reducer, gauge=gauge, robust=robust, sidecar=sidecar), trained, bound)
    for name, reducer, gauge, robust, sidecar, trained, bound in (
        ("fedit", FactorMean(), Gauge(), Off(), False, Trained.BOTH, MEAN_BOUND),
        ("ffa", FactorMean(), Gauge(), Off(), False, Trained.B, MEAN_BOUND),
        ("rolora (A)", FactorMean(), Gauge(), Off(), False, Trained.A, MEAN_BOUND),
        ("flora", Stack(), Reset(), Off(), True, Trained.BOTH, BLOCK_BOUND),
        ("fedex", FactorMean(), Gauge(), Off(), True, Trained.BOTH, BLOCK_BOUND),
        ("flexlora", BestRank(), Balanced(), Off(), False, Trained.BOTH, SVD_BOUND),
        ("flexlora, theirs", BestRank(), Orthonormal(), Off(), False, Trained.BOTH, SVD_BOUND),
        ("fedsvd", FactorMean(), Orthonormal(), Off(), False, Trained.B, SVD_BOUND),
        ("fedrot", FactorMean(), Procrustes(SOFTNESS), Off(), False, Trained.BOTH, MEAN_BOUND),
        ("hetlora", PaddedFactorMean(), Gauge(), Off(), False, Trained.BOTH, MEAN_BOUND),
        ("trimmed mean (B)", TrimmedMean(TRIM), Gauge(), Off(), False, Trained.B, MEAN_BOUND),
        ("fedit, median", FactorMean(), Gauge(), GeometricMedian(), False, Trained.BOTH, MEAN_BOUND),
    )
}


@dataclass(frozen=True)
class Cost:
    """One thing measured. seconds: best of a few calls; mib: peak above what was there; error: relative to the dense way; bound: None where nothing is asked."""

    name: str
    seconds: float
    mib: float
    error: float
    bound: float | None


def names_of(module: int) -> tuple[str, str]:
    return tuple(f"base_model.model.layers.{module:03d}.lora_{factor}.weight" for factor in "AB")


def made_adapter(modules: int, d_out: int, d_in: int, rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Float32 factors as after some rounds: B no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for module in range(modules):
        a, b = names_of(module)
        adapter[a] = torch.randn(rank, d_in, generator=generator) / d_in**0.5
        adapter[b] = torch.randn(d_out, rank, generator=generator) * 0.02
    return adapter


def moved(adapter: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """A client: a tenth away from the global adapter."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return {n: t + 0.1 * t.std() * torch.randn(t.shape, generator=generator) for n, t in adapter.items()}


def status(field_name: str, pid: int | str = "self") -> float:
    """A line of /proc/<pid>/status, MiB; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field_name)), 0.0)


def map_blocks_above(size: int) -> None:
    """From now on malloc maps blocks of that many bytes and more on their own, and unmaps them when they are freed (M_MMAP_THRESHOLD).

    Small, the high-water mark is that of live memory; large, no time goes into mapping, as in a process that has run for a while.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, size)
    libc.malloc_trim(0)


def best_of(times: int, work: Callable[[], object]) -> float:
    """Shortest of several runs, in seconds; one where a run takes a second or more."""
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spans.append(time.perf_counter() - start)
        if spans[0] >= 1:
            break
    return min(spans)


def peak_of(work: Callable[[], object]) -> float:
    """Peak of resident memory above where it stood, MiB."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return max(status("VmHWM") - before, 0.0)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


class Matrix:
    """One matrix of one cohort: the round as reduce_round takes it, and the dense way to the same results."""

    def __init__(self, d_out: int, d_in: int, rank: int, num_clients: int) -> None:
        self.rank = rank
        self.a, self.b = names_of(0)
        self.adapter = made_adapter(1, d_out, d_in, rank, seed=0)
        self.clients = {k: moved(self.adapter, k) for k in range(num_clients)}
        raw = [k % 3 + 1 for k in range(num_clients)]
        self.weights = {k: n / sum(raw) for k, n in enumerate(raw)}

    def cohort(self, trained: Trained) -> Cohort:
        return Cohort(
            adapter=self.adapter,
            scales={"layers.000": SCALE},
            weights=self.weights,
            read=lambda client, name: self.clients[client][name],
            round=2,
            seed=0,
            trained=trained,
        )

    def pairs(self, trained: Trained) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(B_k, A_k) in float64; a factor nobody trained is the adapter's."""
        held = [
            {n: (client if trained.covers(n) else self.adapter)[n].double() for n in (self.a, self.b)}
            for client in self.clients.values()
        ]
        return [(tensors[self.b], tensors[self.a]) for tensors in held]

    def stack(self) -> LowRank:
        return weighted_sum(list(self.weights.values()), [LowRank(SCALE * b, a) for b, a in self.pairs(Trained.BOTH)])

    def dense(self) -> torch.Tensor:
        pairs = self.pairs(Trained.BOTH)
        return sum(w * SCALE * (b @ a) for w, (b, a) in zip(self.weights.values(), pairs, strict=True))

    def dense_svd(self) -> torch.Tensor:
        """The best rank-r by the dense SVD, [d_out, d_in]."""
        u, s, vt = torch.linalg.svd(self.dense(), full_matrices=False)
        return (u[:, : self.rank] * s[: self.rank]) @ vt[: self.rank]

    def core(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by the QR-core, in factors."""
        svd = truncated_svd(self.stack(), self.rank)
        return svd.u * svd.s, svd.vt

    def lowrank(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by torch's own randomised way, which wants the dense matrix."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(self.dense(), q=self.rank)
        return u * s, v.T

    def wanted(self, name: str, best: torch.Tensor, weights: list[float]) -> torch.Tensor:
        """What the preset stands for, densely: a product, side-car included."""
        choices, trained, _ = PRESETS[name]
        if choices.sidecar:
            return self.dense()
        if isinstance(choices.reducer, BestRank):
            return best
        pairs = self.pairs(trained)
        old = (self.adapter[self.b].double(), self.adapter[self.a].double())
        if isinstance(choices.gauge, Procrustes):
            pairs = [self._turned(b, a, old[1]) for b, a in pairs]
        if isinstance(choices.reducer, TrimmedMean):
            drop = int(TRIM * len(pairs))
            b = torch.stack([b for b, _ in pairs]).sort(0).values[drop : len(pairs) - drop].mean(0)
            return SCALE * b @ old[1]
        b = sum(w * b for w, (b, _) in zip(weights, pairs, strict=True))
        return SCALE * b @ sum(w * a for w, (_, a) in zip(weights, pairs, strict=True))

    def _turned(self, b: torch.Tensor, a: torch.Tensor, old_a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turn = nearest_rotation(a @ old_a.T)
        turn = nearest_rotation((1 - SOFTNESS) * torch.eye(len(turn)).double() + SOFTNESS * turn)
        return b @ turn, turn.T @ a

    def sent(self, reduced: Reduced) -> torch.Tensor:
        """The product that goes out: the float64 mean, before its cast, and the block."""
        held = {n: reduced.mean.get(n, t).double() for n, t in self.adapter.items()}
        product = SCALE * held[self.b] @ held[self.a]
        if reduced.block:
            product += reduced.block[self.b].double() @ reduced.block[self.a].double()
        return product


def measure_matrix(d_out: int, d_in: int, rank: int, num_clients: int) -> list[Cost]:
    """All presets, the QR-core, the dense SVD and svd_lowrank on one matrix: memory first, then times, then errors.

    The dense SVD runs once, for all three.
    """
    matrix = Matrix(d_out, d_in, rank, num_clients)
    works: dict[str, Callable[[], object]] = {
        name: (lambda choices=choices, trained=trained: reduce_round(choices, matrix.cohort(trained)))
        for name, (choices, trained, _) in PRESETS.items()
    }
    works |= {"QR-core": matrix.core, "torch.svd_lowrank": matrix.lowrank}
    map_blocks_above(2**16)
    matrix.core()  # MKL keeps the buffers of its first call
    mib = {name: peak_of(work) for name, work in works.items()}
    kept: list[torch.Tensor] = []
    start = time.perf_counter()
    mib["dense SVD"] = peak_of(lambda: kept.append(matrix.dense_svd()))
    seconds = {"dense SVD": time.perf_counter() - start}
    map_blocks_above(2**25)
    seconds |= {name: best_of(9 if name == "QR-core" else 3, work) for name, work in works.items()}
    best = kept[0]
    costs = []
    for name, (_, _, bound) in PRESETS.items():
        reduced = works[name]()
        wanted = matrix.wanted(name, best, list(reduced.weights.values()))
        costs.append(Cost(name, seconds[name], mib[name], relative(matrix.sent(reduced), wanted), bound))
    (left, right), (other, rows) = matrix.core(), matrix.lowrank()
    return [
        *costs,
        Cost("QR-core", seconds["QR-core"], mib["QR-core"], relative(left @ right, best), SVD_BOUND),
        Cost("dense SVD", seconds["dense SVD"], mib["dense SVD"], 0.0, SVD_BOUND),
        Cost(
            "torch.svd_lowrank",
            seconds["torch.svd_lowrank"],
            mib["torch.svd_lowrank"],
            relative(other @ rows, best),
            None,
        ),
    ]


def over_layer(measured: list[tuple[int, list[Cost]]]) -> list[Cost]:
    """A layer from its matrices: seconds times their count, the largest memory (they come one after another) and error."""
    rows = zip(*(costs for _, costs in measured), strict=True)
    counts = [count for count, _ in measured]
    return [
        Cost(
            row[0].name,
            sum(n * cost.seconds for n, cost in zip(counts, row, strict=True)),
            max(cost.mib for cost in row),
            max(cost.error for cost in row),
            row[0].bound,
        )
        for row in rows
    ]
