"""Whether model, adapter, rows and machine can do what a run asks of them: looked at when the model is there and nothing is written yet."""

from collections.abc import Sequence
from dataclasses import replace

from fedunlearn.aggregation.combinations import variant_of
from fedunlearn.aggregation.factors import modules_of
from fedunlearn.config.launcher import LocalLauncher
from fedunlearn.config.parallel import parallel_args
from fedunlearn.config.run import TrainRun
from fedunlearn.data.alternates import given_alternates
from fedunlearn.data.benchmark import Benchmark
from fedunlearn.data.chat import EncodedRow
from fedunlearn.data.tofu import as_tofu
from fedunlearn.errors import UserError
from fedunlearn.methods.base import Method
from fedunlearn.methods.tokens import Need
from fedunlearn.models.base import choose_device
from fedunlearn.models.hidden_states import num_blocks
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Adapter
from fedunlearn.records.partition import OwnedRows
from fedunlearn.training.able import check_able
from fedunlearn.training.parallel.team import check_team


def check_fit(run: TrainRun, made: Resident, start: Adapter, data: Benchmark, owned: Sequence[OwnedRows]) -> None:
    """Raises UserError where they do not fit together. start: the adapter that the run begins with; owned: every client's rows."""
    if isinstance(run.launcher, LocalLauncher):  # elsewhere each client says at the roll call what it can do
        check_able(made, run.trainer.args, choose_device(run.model.model_args))
    for check in (_check_variant, _check_ranks, _check_sides, _check_export):
        check(run, start)
    _check_method(run, made, data, owned)
    _check_parallel(run, made)
    for rows in owned:
        data.encode(made.chat, (*rows.forget, *rows.retain))


def _check_variant(run: TrainRun, start: Adapter) -> None:
    """Raises UserError where a loaded adapter is of a kind that this run would average wrongly: the yaml may leave its keys null."""
    faults = run.variant_faults(replace(variant_of(start.peft_config), initial="True"))  # what it began with is past
    if faults:
        raise UserError(*faults)


def _check_ranks(run: TrainRun, start: Adapter) -> None:
    """Raises UserError where a client's own rank is above the adapter's, or modules have ranks of their own already."""
    largest = int(str(start.peft_config["r"]))
    above = [rank for rank in run.partition.ranks or () if rank > largest]
    if above:
        raise UserError(
            f"partition.ranks={list(run.partition.ranks or ())}: {above[0]} is above the adapter's r={largest}, which is the largest there can be: "
            f"lower it, or raise model.model_args.lora_config.r"
        )
    if run.ranks_differ and (start.peft_config.get("rank_pattern") or start.peft_config.get("alpha_pattern")):
        raise UserError(
            "partition.ranks or lora_alphas beside an adapter whose modules have ranks of their own (rank_pattern): leave them null"
        )


def _check_method(run: TrainRun, made: Resident, data: Benchmark, owned: Sequence[OwnedRows]) -> None:
    """Raises UserError for a layer that the model lacks, for forget rows whose alternate answers are missing or too long, and where all of them are too short."""
    if run.local_method is None:
        return
    if {Need.HIDDEN, Need.REFERENCE_HIDDEN} & (run.local_method.needs | run.local_method.retain_needs):
        run.local_method.hidden_layer(num_blocks(made.model))
    numbers = tuple(number for rows in owned for number in rows.forget)
    _check_skip(run.local_method, data.encode(made.chat, numbers))
    if run.local_method.alternates in ("idk", "pairs"):
        texts, full = given_alternates(run.data, numbers), as_tofu(data).rows("full")
        for number in numbers:
            longest = max(texts[number], key=len)
            made.chat.encode(full[number].question, longest, f"alternate of full row {number}")


def _check_skip(method: Method, rows: Sequence[EncodedRow]) -> None:
    longest = max((len(row.input_ids) - row.num_prompt for row in rows), default=0)
    if rows and longest <= method.skipped_labels:
        raise UserError(
            f"method {type(method).__name__} leaves out each row's first {method.skipped_labels} labels (method.skip), and no row of the request has more than "
            f"{longest}: nothing would be unlearned; lower it"
        )


def _check_parallel(run: TrainRun, made: Resident) -> None:
    """Raises UserError where this machine is where the clients work, and cannot carry out what trainer.parallel asks for."""
    args = parallel_args(run.trainer.parallel)
    if args.kind != "none" and not run.launcher.submits:
        check_team(made, args, choose_device(run.model.model_args))


def _check_sides(run: TrainRun, start: Adapter) -> None:
    """Raises UserError where an SVD is to give r directions of a matrix that has fewer."""
    chosen = run.aggregation
    wants = {
        f"aggregation.reducer={chosen.reducer}": chosen.reducer == "product",
        f"aggregation.gauge={chosen.gauge}": chosen.gauge in ("balanced", "orthonormal"),
        f"aggregation.export_rank={chosen.export_rank}": chosen.export_rank == "r" and _has_sidecar(run, start),
    }
    asked = [key for key, holds in wants.items() if holds]
    for module in modules_of(start.tensors) if asked else ():
        (rank, d_in), d_out = start.tensors[module.a].shape, start.tensors[module.b].shape[0]
        if rank > min(d_in, d_out):
            raise UserError(
                f"{asked[0]} with rank {rank} (model.model_args.lora_config.r, or the loaded adapter's) of module {module.name!r}, whose sides are "
                f"{d_out} and {d_in}: its product has {min(d_in, d_out)} directions at most; lower r to that, leave the module out of "
                "model.model_args.lora_config.target_modules, or choose aggregation=fedit"
            )


def _check_export(run: TrainRun, start: Adapter) -> None:
    """Raises UserError for a choice between two forms of a side-car where there is none."""
    if run.aggregation.export_rank == "r" and not _has_sidecar(run, start):
        raise UserError(
            f"aggregation.export_rank=r beside aggregation.residual={run.aggregation.residual}: there is no side-car to be taken in, and the result "
            "has rank r as it is; leave it exact, or set aggregation.residual=sidecar"
        )


def _has_sidecar(run: TrainRun, start: Adapter) -> bool:
    """Whether the result will have one: from this run, or as the stack that its adapter came as."""
    return run.aggregation.residual == "sidecar" or bool(start.sidecar) or run.server_method is not None
