"""Aggregation at the shape of one Llama-3.2-1B layer: time, peak memory and error of every reducer against the dense float64 way.

    python benchmarks/aggregation.py [--json] [--threads 1]

Three sections. Reducers: each preset at the layer's three sizes of matrix (8192x2048 stands for 2048x8192 too), rank 16, 4 and 16
clients, float64 inside as in production; the QR-core beside torch.linalg.svd of the dense matrix and torch.svd_lowrank. Two passes:
peak memory of a whole reduction, robust weights included, with clients' files mapped from disk. Server steps: each optimiser once over
the layer's adapter. Two minutes of work, up to six beside others; exit code 1 where an error or the memory is above its bound, or the QR-core too slow.
Errors: 1e-14 for the QR-core; flora and fedex show about 1e-8, for their side-car blocks are float32. One thread: beside other busy processes two of them wait for each other, small matrices ten times as long, and the ratio says nothing.

Every (size, clients) is a process of its own. Peak memory is the kernel's own high-water mark (VmHWM, set back through
/proc/self/clear_refs before each call; malloc is told to hand freed blocks back), less what was resident before. The two passes map
files, and pages of files count as resident without being memory of the process's own: there the peak is that of RssAnon, read by
the parent a thousand times a second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from aggregation_costs import (
    SCALE,
    Cost,
    best_of,
    made_adapter,
    map_blocks_above,
    measure_matrix,
    moved,
    over_layer,
    peak_of,
    status,
)

from fedunlearn.aggregation.base import ServerOptimizer, ServerState
from fedunlearn.aggregation.fedadagrad import FedAdagrad
from fedunlearn.aggregation.fedadam import FedAdam
from fedunlearn.aggregation.fedavg import FedAvg
from fedunlearn.aggregation.fedavgm import FedAvgM
from fedunlearn.aggregation.fedprox import FedProx
from fedunlearn.aggregation.fedyogi import FedYogi
from fedunlearn.aggregation.gauges.svd import Balanced
from fedunlearn.aggregation.reduce import Choices, Cohort, reduce_round
from fedunlearn.aggregation.reducers.best_rank import BestRank
from fedunlearn.aggregation.robust.geometric_median import GeometricMedian
from fedunlearn.federation.spool import open_spool

LAYER = ((2048, 2048, 2), (512, 2048, 2), (8192, 2048, 3))  # d_out, d_in, how many: q o, k v, gate up down
RANK, COHORTS = 16, (4, 16)
MODULES, WIDTH, NARROW, PASS_COHORTS = 64, 1024, 4, (4, 16, 64)  # two passes: modules, width, rank, clients
# The QR-core against the dense SVD, over the layer, by number of clients.
SPEEDUP = {4: 50.0, 16: 10.0}
# What grows with K, over one module of K clients in float32 (1). Of float64 (2): the robust pass holds clients (2), their updates, of
# twice the rank (4), those stacked (4), one operand more (2), and three (2 K r)^2 matrices: 3 more at K = 64 here. 64 would be all modules.
GROWTH_BOUND = 18.0

OPTIMIZERS = (FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi)


@dataclass(frozen=True)
class Peak:
    """One reduction over all modules. anonymous: peak of its own memory; mapped: pages of the clients' files that stayed resident; MiB."""

    clients: int
    anonymous: float
    mapped: float
    seconds: float


@dataclass
class Report:
    """What was measured: layer costs by number of clients, peaks by number of clients, MiB that the peaks are made of, server steps."""

    layer: dict[int, list[Cost]] = field(default_factory=dict)
    peaks: list[Peak] = field(default_factory=list)
    terms: dict[str, float] = field(default_factory=dict)
    steps: list[Cost] = field(default_factory=list)


def two_passes(modules: int, width: int, rank: int, num_clients: int, folder: str) -> None:
    """A whole reduction with robust weights, clients' files mapped from disk; prints RssAnon and RssFile before it, RssFile and seconds after it."""
    adapter = made_adapter(modules, width, width, rank, seed=0)
    weights = dict.fromkeys(range(num_clients), 1 / num_clients)
    scales = {f"layers.{module:03d}": SCALE for module in range(modules)}
    choices = Choices(reducer=BestRank(), gauge=Balanced(), robust=GeometricMedian())
    with open_spool(Path(folder)) as spool:
        for k in weights:
            spool.keep(k, safetensors.torch.save(moved(adapter, k)))
        map_blocks_above(2**16)
        print(status("RssAnon"), status("RssFile"), flush=True)
        start = time.perf_counter()
        with spool.reader(weights) as read:
            reduce_round(choices, Cohort(adapter=adapter, scales=scales, weights=weights, read=read, round=2, seed=0))
            print(status("RssFile"), time.perf_counter() - start, flush=True)


def watched(threads: int, arguments: dict[str, int | str]) -> Peak:
    """Runs two_passes in a child and reads its RssAnon all along; above what it held before the first pass."""
    with _child("passes", threads, arguments) as child:
        assert child.stdout is not None
        ready, files = map(float, child.stdout.readline().split())
        peak = ready
        while child.poll() is None:
            peak = max(peak, status("RssAnon", child.pid))
            time.sleep(0.0005)  # a module takes some milliseconds
        mapped, seconds = map(float, child.stdout.readline().split())
    if child.returncode:
        raise SystemExit(f"a measurement ended with exit code {child.returncode}")
    return Peak(int(arguments["num_clients"]), peak - ready, mapped - files, seconds)


def pass_terms(modules: int, width: int, rank: int) -> dict[str, float]:
    """MiB: the global adapter (held before), the result in float64, one module of one client in float32."""
    unit = 2 * width * rank * 4 / 2**20
    return {"adapter": modules * unit, "result": modules * unit * 2, "one module of one client": unit}


def growth(report: Report) -> float:
    """MiB more from the smallest to the largest cohort, over one module of that many more clients."""
    first, last = report.peaks[0], report.peaks[-1]
    return (last.anonymous - first.anonymous) / (
        (last.clients - first.clients) * report.terms["one module of one client"]
    )


def measure_steps(layer: tuple[tuple[int, int, int], ...], rank: int) -> list[Cost]:
    """One server step of each optimiser over the layer's adapter, moments already there."""
    adapter = {}
    for i, (d_out, d_in, count) in enumerate(layer):
        for j in range(count):
            made = made_adapter(1, d_out, d_in, rank, seed=10 * i + j)
            adapter |= {f"{i}.{j}.{name}": tensor for name, tensor in made.items()}
    mean = {name: tensor.double() for name, tensor in moved(adapter, 0).items()}
    works = []
    for make in OPTIMIZERS:
        optimizer: ServerOptimizer = make()
        state = optimizer.step(ServerState(adapter=adapter), mean)
        works.append((make.__name__, lambda optimizer=optimizer, state=state: optimizer.step(state, mean)))
    map_blocks_above(2**16)
    mib = [peak_of(work) for _, work in works]
    map_blocks_above(2**25)
    return [Cost(name, best_of(5, work), most, 0.0, None) for (name, work), most in zip(works, mib, strict=True)]


def faults(report: Report) -> list[str]:
    """What is above its bound."""
    found = []
    for clients, costs in report.layer.items():
        by_name = {cost.name: cost for cost in costs}
        found += [
            f"K = {clients}, {cost.name}: error {cost.error:.1e} is above {cost.bound:.0e}"
            for cost in costs
            if cost.bound is not None and not cost.error <= cost.bound
        ]
        faster = by_name["dense SVD"].seconds / by_name["QR-core"].seconds
        if faster < SPEEDUP.get(clients, 0.0):
            found.append(
                f"K = {clients}: the QR-core is {faster:.1f} x as fast as the dense SVD, not {SPEEDUP[clients]} x"
            )
    if report.peaks and growth(report) > GROWTH_BOUND:
        found.append(f"the two passes grow by {growth(report):.1f} modules a client, above {GROWTH_BOUND}")
    return found


def shown(report: Report) -> str:
    """The report in lines."""
    lines = []
    for clients, costs in report.layer.items():
        lines.append(f"\none layer, rank {RANK}, K = {clients}: seconds, peak MiB (largest matrix), error (largest)")
        lines += [f"  {c.name:<20}{c.seconds:>10.3f} s {c.mib:>9.1f} MiB   {c.error:.1e}" for c in costs]
        by_name = {cost.name: cost.seconds for cost in costs}
        lines.append(f"  dense SVD / QR-core: {by_name['dense SVD'] / by_name['QR-core']:.1f} x")
    if report.peaks:
        lines.append(f"\nmemory of the two passes: {MODULES} modules of {WIDTH}x{WIDTH}, rank {NARROW} (MiB)")
        lines += [f"  {name}: {mib:.3f}" for name, mib in report.terms.items()]
        for peak in report.peaks:
            unit = report.terms["one module of one client"] * peak.clients
            lines.append(
                f"  K = {peak.clients:>2}: peak {peak.anonymous:6.1f} above the adapter = result {report.terms['result']:.1f} + "
                f"{peak.anonymous - report.terms['result']:6.1f}; one module x K = {unit:.2f}; all files "
                f"{report.terms['adapter'] * peak.clients:.0f}, mapped {peak.mapped:.0f} (the kernel's to drop); {peak.seconds:.1f} s"
            )
        lines.append(
            f"  grows by {growth(report):.1f} x one module a client (bound {GROWTH_BOUND}; {MODULES} would be all of them)"
        )
    if report.steps:
        lines.append("\none server step over the layer's adapter: seconds, peak MiB")
        lines += [f"  {c.name:<20}{c.seconds:>10.4f} s {c.mib:>9.1f} MiB" for c in report.steps]
    return "\n".join(lines).strip()


def _child(what: str, threads: int, arguments: dict[str, int | str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps({"what": what, "threads": threads, **arguments})],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},  # spinning threads are slow beside another busy process
    )


def _answer(what: str, threads: int, arguments: dict[str, int | str]) -> list[Cost]:
    with _child(what, threads, arguments) as child:
        out, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"a measurement ended with exit code {child.returncode}")
    return [Cost(**cost) for cost in json.loads(out)]


def _be_child(what: str, threads: int, **arguments: int | str) -> None:
    torch.set_num_threads(threads)
    if what == "matrix":
        print(json.dumps([asdict(cost) for cost in measure_matrix(**arguments)]))
    elif what == "steps":
        print(json.dumps([asdict(cost) for cost in measure_steps(LAYER, RANK)]))
    else:
        two_passes(**arguments)


def measured(threads: int) -> Report:
    """Everything, one process a measurement."""
    report = Report(terms=pass_terms(MODULES, WIDTH, NARROW))
    for clients in COHORTS:
        report.layer[clients] = over_layer(
            [
                (count, _answer("matrix", threads, {"d_out": a, "d_in": b, "rank": RANK, "num_clients": clients}))
                for a, b, count in LAYER
            ]
        )
    for clients in PASS_COHORTS:
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"modules": MODULES, "width": WIDTH, "rank": NARROW, "num_clients": clients, "folder": folder}
            report.peaks.append(watched(threads, sizes))
    report.steps = _answer("steps", threads, {})
    return report


def main() -> int:
    """Measures, prints, and says with its exit code whether all bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _be_child(**json.loads(args.child))
        return 0
    report = measured(args.threads)
    found = faults(report)
    if args.json:
        print(json.dumps({**asdict(report), "growth": growth(report), "faults": found}, indent=1))
    else:
        print(shown(report), *(f"\nFAULT {fault}" for fault in found), sep="")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
