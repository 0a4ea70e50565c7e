"""From a composed config to a run that can start: data, partition and model checked, then the folder made."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.config.lora import without_adalora
from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.data.benchmark import Benchmark
from fedunlearn.data.opened import open_benchmark
from fedunlearn.data.ownership import (
    FILE,
    check_ownership,
    find_partition,
    owned_rows,
    write_partition,
)
from fedunlearn.data.requests import earlier_request, find_request, write_released, write_request
from fedunlearn.data.tofu import as_tofu
from fedunlearn.doors.compose import ComposedConfig
from fedunlearn.doors.fitting import check_fit
from fedunlearn.doors.origin import check_ledger_size, check_ledgers, past_of
from fedunlearn.errors import NotApplicableError, UserError
from fedunlearn.evals.files import FILES_OF, read_log
from fedunlearn.evals.suites import read_suite
from fedunlearn.federation.flower_strategy import WrappedStrategy
from fedunlearn.federation.launchers import check_launcher
from fedunlearn.federation.past import write_past
from fedunlearn.federation.planning import check_plans
from fedunlearn.federation.start import counted, load_start, save_start
from fedunlearn.files import settle_below, write_json
from fedunlearn.models.adapter_files import saved_hash
from fedunlearn.models.export import unit_scaled
from fedunlearn.models.initial import from_base
from fedunlearn.models.resident import Resident, resident
from fedunlearn.models.source import START, ModelSource, adapter_folder, resolve_source
from fedunlearn.records.adapter import Adapter, B
from fedunlearn.records.evaluation import EvalLog
from fedunlearn.records.partition import OwnedRows, Partition
from fedunlearn.records.requests import Request
from fedunlearn.reporting.run_folder import config_hash, judge_folder, make_folder, provenance, run_path

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R", TrainRun, EvalRun, TrainRun | EvalRun)
CENTRAL = "central"
"""What the config of the central baseline has as its `door`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """A run whose folder stands: config, provenance.json, partition.json, start/. start: the adapter training begins with, its side-car too."""

    run: TrainRun
    folder: Path
    data: Benchmark
    source: ModelSource
    start: Adapter
    retain_log: EvalLog | None
    request: Request


@dataclass(frozen=True, eq=False, kw_only=True)
class Inputs:
    """What a run reads: data, the oracle's log where one is named, base and adapter."""

    data: Benchmark
    retain_log: EvalLog | None
    source: ModelSource


def prepare(composed: ComposedConfig) -> Prepared:
    """Checks everything that can be known without a model, then loads it, then makes the run's folder.

    Raises UserError with nothing written. With resume=true the folder's own start adapter and partition are taken, and what a killed process left
    half-written is removed. Whoever calls it holds the folder's lock (reporting.run_lock) until the run has ended.
    """
    run = composed.run
    if not isinstance(run, TrainRun):
        raise UserError(
            f"mode={run.mode!r} is for src/eval.py: give --config-name=train-lora.yaml or unlearn-lora.yaml"
        )
    if isinstance(run.strategy, FlowerStrategy):
        WrappedStrategy.build(run.strategy, run.trainer.args.seed)  # a class of the user's may refuse itself
    check_launcher(run.launcher)
    folder = run_path(run)
    inputs = find_inputs(run, composed.plain)
    data, source = inputs.data, inputs.source
    partition = _partition(run, folder, inputs)
    request = find_request(run, earlier_request(source.run), data, partition)
    _check_data(run, inputs, partition, request)
    owned = owned_rows(run.data.rows, partition, request, replays=run.replays)
    if composed.plain.get("door") != CENTRAL:  # where there are no rounds there is no plan
        check_plans(run, {rows.client_id: counted(rows) for rows in owned})
    made, start = _loaded(run, source, data, owned)
    hashes = {
        "base": made.fingerprint,
        "start_adapter": start.tensor_hash,
        "source": saved_hash(source.adapter),
        "data": data.hash("full"),
        "partition": partition.hash,
        "request": request.hash,
    }
    check_ledger_size(run, start, owned)
    check_ledgers(run, source.run)
    past = past_of(run, composed.plain, source.run, partition, request)

    def fill(place: Path) -> None:
        write_partition(place / FILE, partition)
        write_request(place, request)
        write_past(place, source.run, past)
        if run.protocol.releases:
            write_released(place, request, as_tofu(data))
        write_json(place / "provenance.json", {**provenance(run, hashes), "config_hash": config_hash(composed.plain)})
        save_start(place, start, owned, lambda numbers: len(data.encode(made.chat, numbers)))

    make_folder(run, composed.plain, composed.text, fill)
    if run.resume:
        settle_below(folder)
    if run.resume:
        start = _kept_start(run, folder, start, source)
    return Prepared(
        run=run,
        folder=folder,
        data=data,
        source=source,
        start=start,
        retain_log=inputs.retain_log,
        request=request,
    )


def _loaded(
    run: TrainRun, source: ModelSource, data: Benchmark, owned: Sequence[OwnedRows]
) -> tuple[Resident, Adapter]:
    """Gives the model and its adapter. Raises UserError where the two, or the rows, do not fit what is asked of them."""
    made = load_model(run, source)
    if made.start is None:
        raise ValueError("a federated run has an adapter")
    check_fit(run, made, made.start, data, owned)
    return made, made.start


def check_requests(run: TrainRun) -> None:
    """Raises UserError for the first of several requests that cannot be served once those in front of it are."""
    data, _ = open_data(run)
    source = resolve_source(run.model.model_args, Path(run.paths.pocket_dir))
    partition = find_partition(run.partition, source.run, data, run.trainer.federated.num_clients)
    earlier = earlier_request(source.run)
    taken: frozenset[int] = frozenset()
    for number, wanted in enumerate(run.requests or ()):
        alone = replace(run, requests=(wanted,))
        earlier = find_request(alone, earlier, data, partition, number)
        check_ownership(alone, data, partition, earlier)
        owners = partition.owners(earlier.rows)
        if run.server_method is not None and run.server_method.reads_contributions and owners & taken:
            raise NotApplicableError(
                f"requests[{number}] names rows of clients {sorted(owners & taken)}, as one in front of it does: method {type(run.method).__name__} takes all "
                "that a client gave away at once; name them in one request, or choose another method"
            )
        taken |= owners


def _check_data(run: TrainRun, inputs: Inputs, partition: Partition, request: Request) -> None:
    """Raises UserError for what ownership or the evaluation forbids; warns where the adapter is not what one would expect."""
    source = inputs.source
    check_ownership(run, inputs.data, partition, request)
    if run.eval.at_end or inputs.retain_log is not None:
        check_evaluation(run, inputs.data, request if request.rows else None, inputs.retain_log)
    if run.mode == "unlearn" and source.adapter is None:
        log.warning(
            "unlearning begins with a fresh adapter: nothing was fine-tuned (name an adapter or a run as lora_model_path)"
        )
    if source.adapter is not None and source.run is None and run.partition.path is None:
        log.warning(
            "the adapter %s came without a partition: one is made anew by %s", source.adapter, dict(partition.scheme)
        )


def _kept_start(run: TrainRun, folder: Path, start: Adapter, source: ModelSource) -> Adapter:
    """Gives what the run began with, as it lies in its folder. start: what the model gives now. Raises UserError where the two are not the same.

    Factors of the base's own weights (pissa, olora) may differ in what another machine's SVD leaves open: there they must be those of this base, with the
    side-car that takes their product out again.
    """
    kept, lora = load_start(folder).adapter, run.model.model_args.lora_config
    drawn = source.adapter is None and lora is not None and from_base(lora.init_lora_weights)
    if kept == start or (drawn and _begins_at_base(kept, start)):
        return kept
    raise UserError(
        f"{str(folder / START)!r} is not the adapter that the model now names: the run it came from was made anew; overwrite=true starts anew"
    )


def _begins_at_base(kept: Adapter, start: Adapter) -> bool:
    same = kept.base_fingerprint == start.base_fingerprint and kept.peft_config == start.peft_config
    if not same or kept.tensors.keys() != start.tensors.keys():
        return False
    folded = unit_scaled(kept)
    return folded.keys() == kept.sidecar.keys() and all(
        torch.allclose(kept.sidecar[name], -folded[name] if name.endswith(B) else folded[name]) for name in folded
    )


def find_inputs(run: TrainRun | EvalRun, plain: Mapping[str, object]) -> Inputs:
    """Looks at the run's folder, the data with the retain log, and the model's files.

    Raises UserError with the faults of all three. After the first fault nothing is built or fetched any more.
    """
    faults: list[str] = []
    pocket_dir = Path(run.paths.pocket_dir)
    tried(faults, lambda: judge_folder(run, plain))
    opened = (
        tried(faults, lambda: open_data(run))
        if not faults or Path(str(run.muse_path or run.tofu_path)).is_dir()
        else None
    )
    source = tried(faults, lambda: resolve_source(run.model.model_args, pocket_dir, fetch=not faults))
    reference = run.eval.reference_model_path
    if reference is not None:
        other = at_model(run, reference).model.model_args
        tried(faults, lambda: resolve_source(other, pocket_dir, fetch=not faults))
    if source is not None and isinstance(run, TrainRun):
        tried(faults, lambda: _check_source(source, run_path(run)))
    if faults or opened is None or source is None:
        raise UserError(*faults)
    return Inputs(data=opened[0], retain_log=opened[1], source=source)


def at_model(run: R, path: str) -> R:
    """The run with another model in its model's place: a base, an adapter or a run. An initialisation stays behind, and of AdaLoRA all: adapters bring their values along."""
    lora, place = run.model.model_args.lora_config, Path(path).expanduser()
    if lora is not None:
        asks = lora.adalora is not None and place.exists()
        lora = without_adalora(lora) if asks and adapter_folder(place, "eval.reference_model_path") else lora
        lora = replace(lora, init_lora_weights=None)
    args = replace(run.model.model_args, pretrained_model_name_or_path=path, lora_model_path=None, lora_config=lora)
    return replace(run, model=replace(run.model, model_args=args))


def tried(faults: list[str], work: Callable[[], T]) -> T | None:
    """Gives what the work gives; where it raises UserError None, its faults being added to `faults`."""
    try:
        return work()
    except UserError as error:
        faults += error.faults
    return None


def open_data(run: TrainRun | EvalRun) -> tuple[Benchmark, EvalLog | None]:
    """Opens the benchmark, checks that the splits are a pair, that what will be evaluated is there, and the retain log where one is named."""
    data = open_benchmark(run)
    data.check_splits(run.forget_split, run.retain_split)
    retain_log = None if run.retain_logs_path is None else read_log(Path(run.retain_logs_path), FILES_OF[run.eval.name])
    if run.requests is None and (isinstance(run, EvalRun) or run.eval.at_end or retain_log is not None):
        check_evaluation(run, data, None, retain_log)
    return data, retain_log


def check_evaluation(
    run: TrainRun | EvalRun, data: Benchmark, request: Request | None, retain_log: EvalLog | None
) -> None:
    """Raises UserError where rows that will be evaluated are missing, or the retain log speaks of others."""
    read_suite(data, run.forget_split, run.eval, request).check(retain_log, run.eval, max_length_of(run))


def _partition(run: TrainRun, folder: Path, inputs: Inputs) -> Partition:
    """The run's own partition where it is resumed, else the one that its config and adapter name."""
    num_clients = run.trainer.federated.num_clients
    if not run.resume:
        return find_partition(run.partition, inputs.source.run, inputs.data, num_clients)
    missing = [name for name in (f"{START}/", FILE) if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"resume=true, but {str(folder)!r} lacks {', '.join(missing)}: put it back, or overwrite=true starts anew in its place"
        )
    return find_partition(replace(run.partition, path=str(folder)), None, inputs.data, num_clients)


def load_model(run: TrainRun | EvalRun, source: ModelSource) -> Resident:
    """Gives the process's model with its start adapter in place."""
    seed = run.trainer.args.seed if isinstance(run, TrainRun) else 0
    pocket_dir = Path(run.paths.pocket_dir)
    return resident(run.home, source, seed=seed, max_length=max_length_of(run), pocket_dir=pocket_dir)


def max_length_of(run: TrainRun | EvalRun) -> int:
    """Tokens of a row at most."""
    return run.data.max_length if isinstance(run, TrainRun) else run.max_length


def _check_source(source: ModelSource, folder: Path) -> None:
    inside = source.adapter is not None and folder.resolve() in source.adapter.resolve().parents
    if inside:
        raise UserError(
            f"the adapter {str(source.adapter)!r} lies in the folder of this very run, {str(folder)!r}: choose another task_name"
        )
