"""The three things a door can do: a federated run, the central baseline, an evaluation."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from fedunlearn.aggregation.choices import trained_in
from fedunlearn.config.run import EvalRun, TrainRun
from fedunlearn.doors.compose import ComposedConfig
from fedunlearn.doors.finish import finish
from fedunlearn.doors.prepare import CENTRAL, prepare
from fedunlearn.errors import UserError
from fedunlearn.evals.files import FILES_OF, read_log
from fedunlearn.federation.block_store import FOLDER, BlockStore
from fedunlearn.federation.checkpoint import append_history, latest_checkpoint
from fedunlearn.federation.launchers import launch
from fedunlearn.federation.site import Site, reads_reference, set_threads
from fedunlearn.federation.start import counted
from fedunlearn.protocols.finetune import Finetune
from fedunlearn.protocols.in_round import InRound
from fedunlearn.records.adapter import Adapter, Tensors
from fedunlearn.records.evaluation import EvalLog
from fedunlearn.records.partition import OwnedRows
from fedunlearn.records.rounds import ClientOutcome, ClientRows, ClientTask, Role, RoundResult, RoundSeconds
from fedunlearn.reporting.curves import open_curves
from fedunlearn.reporting.peak_memory import reset_peak
from fedunlearn.reporting.run_folder import config_hash, is_done, judge_folder, run_path
from fedunlearn.reporting.run_lock import run_lock
from fedunlearn.seeds import seed_of
from fedunlearn.training.charges import Charges
from fedunlearn.training.local import LocalResult

log = logging.getLogger(__name__)


Carry = Callable[[Mapping[str, Any]], None]


def run_federated(composed: ComposedConfig, carry: Carry | None = None) -> EvalLog | None:
    """Fine-tunes or unlearns in the federation, saves adapter and account, evaluates; gives the evaluation where there is one.

    From the first look at the run's folder to its last file the folder is this process's alone. A finished run that is resumed stays as it is.
    carry: takes the prepared run to its last round, given its plain config; None: its launcher does.
    """
    with run_lock(run_path(composed.run)):
        if composed.run.resume and is_done(run_path(composed.run)):
            return _finished(composed)
        return _federated(composed, carry)


def _finished(composed: ComposedConfig) -> EvalLog | None:
    """Gives what the run in the folder ended with. Raises UserError where it was another."""
    run, folder = composed.run, run_path(composed.run)
    judge_folder(run, composed.plain)
    log.info("%s holds a finished run of this config: there is nothing to go on with", folder)
    return read_log(folder, FILES_OF[run.eval.name]) if run.eval.at_end else None


def _federated(composed: ComposedConfig, carry: Carry | None) -> EvalLog | None:
    reset_peak()  # before the model is loaded: it is the run's too
    set_threads(composed.run)
    prepared = prepare(composed)
    if carry is None:
        launch(prepared.run.launcher, composed.plain)
    else:
        carry(composed.plain)
    last = latest_checkpoint(prepared.folder)
    if last is None or last.state.round != prepared.run.total_rounds:
        raise UserError(
            f"the run stopped before its last round: see the log, then go on with resume=true ({str(prepared.folder)!r})"
        )
    sidecar = BlockStore(prepared.folder / FOLDER).read(last.blocks)
    return finish(prepared, prepared.start.replace(last.state.adapter, sidecar), config_hash(composed.plain))


def run_central(composed: ComposedConfig) -> EvalLog | None:
    """The central baseline: the same loop over all clients' rows at once, in one round, without a federation."""
    composed = replace(composed, plain={**composed.plain, "door": CENTRAL})
    _check_central(composed.run)
    with run_lock(run_path(composed.run)):
        return _central(composed)


def _central(composed: ComposedConfig) -> EvalLog | None:
    reset_peak()
    set_threads(composed.run)
    prepared = prepare(composed)
    run = prepared.run
    log.info("central: one round of trainer.args over all rows; trainer.federated, protocol and the server do not act")
    site = Site(run)
    rows = all_rows(site.owned)
    task = central_task(run)
    try:
        start = prepared.start.weights
        done = site.work(task, rows, start, start if reads_reference(run) else None, Charges(None, 1))
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("the central baseline is one piece, overwrite=true starts anew") from stop
    result = prepared.start.replace({**prepared.start.tensors, **_float32(done.tensors)})
    line = _central_line(result, task, counted(rows, lambda numbers: len(site.encode(numbers))), done)
    append_history(prepared.folder, asdict(line))
    with open_curves(prepared.folder, run.trainer.args.report_to) as curves:
        curves.add(line)
    return finish(prepared, result, config_hash(composed.plain))


def _check_central(run: TrainRun | EvalRun) -> None:
    """Raises UserError, all faults at once, for what only a federation can do."""
    faults = []
    if run.resume:
        faults.append(
            "resume=true: the central baseline is one round, there is nothing to go on with; use overwrite=true"
        )
    if isinstance(run, TrainRun) and run.ranks_differ:
        faults.append(
            "partition.ranks and lora_alphas belong to clients, of which the central baseline has none: leave them null"
        )
    if isinstance(run, TrainRun) and (run.server_method or run.ledger.enabled):
        faults.append(
            "method and ledger: a server-side method or a ledger needs a federation, of which the central baseline has none; use src/fed_train.py"
        )
    lora = run.model.model_args.lora_config
    if lora is not None and lora.adalora is not None:
        faults.append(
            "model.model_args.lora_config.peft_type=ADALORA: ranks are given out by a server, round by round, and the central baseline has one round; set peft_type=LORA, or "
            "use src/fed_train.py"
        )
    if isinstance(run, TrainRun) and run.partition.joins:
        faults.append("partition.joins: the central baseline has one round and no clients; leave it null")
    if isinstance(run, TrainRun) and not isinstance(run.protocol, Finetune | InRound):
        faults.append(
            f"protocol {type(run.protocol).__name__}: the central baseline has nobody to share roles with; leave protocol out"
        )
    if run.eval.in_rounds:
        faults.append(
            "eval.every_n_rounds and eval.clients_every_n_rounds: the central baseline is one round, evaluated at its end; leave them null"
        )
    num_requests = len(run.requests or ())
    if run.mode == "unlearn" and num_requests > 1:
        faults.append(
            f"requests has {num_requests} entries, to be served one after the other, and the central baseline is one run: src/fed_train.py serves them so; "
            "to forget several authors at once name them in one request, as in requests=[{authors: [18, 19]}]"
        )
    if faults:
        raise UserError(*faults)


def central_task(run: TrainRun) -> ClientTask:
    """The task of round 1 for a single client that owns everything: what a federation of one client does."""
    role = Role.UNLEARN if run.mode == "unlearn" else Role.FINETUNE
    seed = seed_of("client", run.trainer.args.seed, 0, 1)
    return ClientTask(
        client_id=0,
        role=role,
        epochs=run.trainer.args.num_train_epochs,
        lr_scale=1.0,
        seed=seed,
        mu=run.strategy.client_mu,
        trained=trained_in(run.aggregation.mask, 1),
        memory={} if run.local_method is None else run.local_method.memory(),
    )


def _float32(tensors: Tensors) -> Tensors:
    return {name: tensor.float() for name, tensor in tensors.items()}


def all_rows(owned: tuple[OwnedRows, ...]) -> OwnedRows:
    """Gives all clients' rows as one client's, in the partition's order."""
    return OwnedRows(
        client_id=0,
        forget=tuple(row for rows in owned for row in rows.forget),
        retain=tuple(row for rows in owned for row in rows.retain),
        num_owned=sum(rows.num_owned for rows in owned),
    )


def _central_line(result: Adapter, task: ClientTask, rows: ClientRows, done: LocalResult) -> RoundResult:
    outcome = ClientOutcome(
        client_id=0,
        role=task.role,
        weight=1.0,
        num_examples=rows.num_owned,
        num_trained=done.num_trained,
        num_steps=done.num_steps,
        num_tokens=done.num_tokens,
        num_reference_tokens=done.num_reference_tokens,
        stopped=done.stopped,
        seconds=done.seconds,
        loss=done.loss,
        loss_trace=done.loss_trace,
    )
    return RoundResult(
        round=1,
        attempt=1,
        adapter_hash=result.tensor_hash,
        seconds=done.seconds,
        parts=RoundSeconds(collecting=done.seconds),
        clients=(outcome,),
    )
