"""The round loop: roll call once, then plan, train, gate, reduce, step, checkpoint and one line of history, round by round."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from flwr.app import RecordDict
from flwr.serverapp import Grid

import fedunlearn
from fedunlearn.aggregation.choices import trained_in
from fedunlearn.aggregation.factors import scales_of
from fedunlearn.aggregation.flower import FlowerStrategy
from fedunlearn.config.run import TrainRun
from fedunlearn.data.ownership import FILE, read_partition
from fedunlearn.data.requests import own_request, read_released
from fedunlearn.federation.block_store import FOLDER, BlockStore
from fedunlearn.federation.checkpoint import (
    Checkpoint,
    Standing,
    append_history,
    history_size,
    read_history,
    save_checkpoint,
)
from fedunlearn.federation.client_evaluation import Survey, lost_in_survey, take_survey
from fedunlearn.federation.collect import Call, Collected, check_all_there, collect
from fedunlearn.federation.conductor import Conductor
from fedunlearn.federation.flower_strategy import WrappedStrategy
from fedunlearn.federation.laps import Laps
from fedunlearn.federation.ledger import Ledger
from fedunlearn.federation.link import Expectation, Member, RollCall, roll_call
from fedunlearn.federation.notes import check_unlearned, mean_losses, step_notes
from fedunlearn.federation.parts import Depot
from fedunlearn.federation.past import read_past
from fedunlearn.federation.planning import Planner, check_plans
from fedunlearn.federation.resume import first_checkpoint
from fedunlearn.federation.roster import Roster
from fedunlearn.federation.round_evaluation import RoundEvaluation
from fedunlearn.federation.server_step import Stepped, Stepper, no_step, step, weigh
from fedunlearn.federation.site import WIRE_DTYPES, client_shapes
from fedunlearn.federation.spool import Spool, open_spool
from fedunlearn.federation.start import Start, load_start
from fedunlearn.federation.wire import shallow
from fedunlearn.files import write_json
from fedunlearn.records.adapter import Adapter
from fedunlearn.records.requests import ReleasedRow
from fedunlearn.records.rounds import Role, RoundResult
from fedunlearn.reporting.curves import Curves, open_curves
from fedunlearn.reporting.progress import track

ROLL_CALL = "roll_call.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Server:
    """What the loop knows from start to end."""

    grid: Grid
    run: TrainRun
    folder: Path
    start: Start
    roster: Roster
    stepper: Stepper
    reads_reference: bool
    released: tuple[ReleasedRow, ...]
    conductor: Conductor | None
    evaluation: RoundEvaluation
    tell: Callable[[RoundResult], None]
    request_hash: str

    @property
    def members(self) -> Mapping[int, Member]:
        """Who takes part, by client id."""
        return self.roster.members

    @property
    def planner(self) -> Planner:
        """Plans over the members."""
        return self.roster.planner


@dataclass(frozen=True, eq=False, kw_only=True)
class Nodes:
    """Clients on other machines. content: what each is told at its roll call; keys: see Expectation; tell: is handed every round's line of history."""

    content: RecordDict = field(default_factory=RecordDict)
    keys: Callable[[], Mapping[int, int]] = dict
    tell: Callable[[RoundResult], None] = lambda result: None


def run_rounds(grid: Grid, run: TrainRun, folder: Path, reads_reference: bool, nodes: "Nodes | None" = None) -> None:
    """Runs the rounds that are left and leaves each one's checkpoint in `folder`.

    What the run began with and partition.json lie there. reads_reference: whether those who unlearn need the adapter it began with. nodes: where clients
    do not share this folder, what they are told instead.
    Raises UserError where the roll call fails or a round cannot be completed; everything up to the last good round is then on disk.
    """
    start = load_start(folder)
    stepper = _stepper(run, folder, start)
    conductor = _conductor(run, folder, start, stepper)
    checkpoint = first_checkpoint(run, folder, start, stepper, conductor)
    timeout = run.trainer.federated.roll_call_timeout
    answers = timeout if run.launcher.clock == "round" else math.inf
    nodes = nodes or Nodes()
    expected, content = _expectation(run, folder, start, nodes), nodes.content
    called = roll_call(grid, expected, timeout, answers, content)
    _write_roll_call(folder, called)
    check_all_there(run, called.refused)
    planner = check_plans(run, {client: start.rows[client] for client in called.members})
    server = Server(
        grid=grid,
        run=run,
        folder=folder,
        start=start,
        roster=Roster(
            grid,
            expected,
            called,
            planner,
            nodes_change=run.launcher.nodes_change,
            content=content,
            timeout=answers,
            keep=partial(_write_roll_call, folder),
        ),
        stepper=stepper,
        reads_reference=reads_reference,
        released=read_released(folder) if run.protocol.releases else (),
        conductor=conductor,
        evaluation=RoundEvaluation(run, folder),
        tell=nodes.tell,
        request_hash=own_request(folder).hash,
    )
    rounds = range(checkpoint.state.round + 1, run.total_rounds + 1)
    with open_curves(folder, run.trainer.args.report_to) as curves:
        for number in track(rounds, f"{run.task_name}: round", len(rounds)):
            checkpoint = _one_round(server, checkpoint, number, curves)
    if run.mode == "unlearn" and conductor is None:
        check_unlearned(run, start.rows, read_history(folder))


def _stepper(run: TrainRun, folder: Path, start: Start) -> Stepper:
    config, foreign = start.adapter.peft_config, None
    if isinstance(run.strategy, FlowerStrategy):
        foreign = WrappedStrategy.build(run.strategy, run.trainer.args.seed)
    return Stepper(
        run=run,
        store=BlockStore(folder / FOLDER),
        scales=scales_of(config, start.adapter.tensors),
        shapes=dict(enumerate(client_shapes(run, config))) if run.ranks_differ else {},
        foreign=foreign,
    )


def _conductor(run: TrainRun, folder: Path, start: Start, stepper: Stepper) -> Conductor | None:
    method = run.server_method
    if method is None:
        return None
    partition, request = read_partition(folder / FILE), own_request(folder)
    return Conductor(
        method=method,
        stepper=stepper,
        start=start,
        past=read_past(folder),
        targets=partition.owners(request.rows),
        all_targets=partition.owners(request.all),
    )


def _expectation(run: TrainRun, folder: Path, start: Start, nodes: Nodes) -> Expectation:
    return Expectation(
        rows=start.rows,
        shapes=client_shapes(run, start.adapter.peft_config),
        joins=tuple(run.partition.joins_at(client) for client in range(len(start.rows))),
        version=fedunlearn.__version__,
        base_fingerprint=str(start.adapter.base_fingerprint),
        quantization=run.model.model_args.quantization or "none",
        layout=start.adapter.layout,
        partition_hash=read_partition(folder / FILE).hash,
        request_hash=own_request(folder).hash,
        min_clients=run.trainer.federated.min_clients,
        keys=nodes.keys,
    )


def _write_roll_call(folder: Path, called: RollCall) -> None:
    answers = {
        str(k): {**shallow(member.declared), "bytes_up": member.bytes_up} for k, member in called.members.items()
    }
    write_json(folder / ROLL_CALL, {"members": answers, "refused": list(called.refused)})


def _one_round(server: Server, before: Checkpoint, number: int, curves: Curves) -> Checkpoint:
    laps = Laps()
    server.roster.renew()
    with open_spool(server.folder) as spool:
        collected = collect(_call(server, before, number), number, before.holds, spool)
        laps.end("collecting")
        stepped = _step(server, before, collected, spool)
        result = _result(server, collected, stepped)
        laps.end("averaging")
        if server.run.ledger.enabled:
            _keep(server, before, collected, stepped, spool)
            laps.end("writing")
    learnt = {update.client_id: update.memory for update in collected.report.updates if update.memory}
    memories = {**before.memories, **learnt}
    after = replace(stepped.after, holds=collected.report.holds, memories=memories, standing=_standing(server))
    result = _evaluated(server, after, result)
    laps.end("evaluating")
    _write(server, after, result, laps, curves)
    return after


def _standing(server: Server) -> Standing:
    ledger = Ledger(server.folder).head if server.run.ledger.enabled else ""
    history = history_size(server.folder)
    return Standing(run_id=server.start.run_id, request=server.request_hash, history=history, ledger=ledger)


def _evaluated(server: Server, after: Checkpoint, result: RoundResult) -> RoundResult:
    """Adds the evaluations that are due."""
    number, every = result.round, server.run.eval.clients_every_n_rounds
    if server.evaluation.due(number):
        result = replace(result, evaluation=server.evaluation.figures(_global(server, after)))
    if every is not None and number % every == 0:
        survey = take_survey(server.grid, _there(server, number), _survey(server, after))
        check_all_there(server.run, lost_in_survey(number, survey))
        result = replace(result, by_clients=survey)
    return result


def _write(server: Server, after: Checkpoint, result: RoundResult, laps: Laps, curves: Curves) -> None:
    """Checkpoint, history line and curves. The line comes when the checkpoint's files are on the disk, and before the rename: resume drops a line without one."""
    line = result

    def keep() -> None:
        nonlocal line
        laps.end("writing")
        line = replace(result, seconds=laps.total, parts=laps.seconds)
        append_history(server.folder, asdict(line))

    save_checkpoint(server.folder, after, server.start.adapter, server.run.trainer.federated.keep_rounds, keep)
    curves.add(line)
    server.tell(line)


def _there(server: Server, number: int) -> dict[int, Member]:
    """Who takes part by now: neither still to join, nor gone."""
    absent = frozenset() if server.conductor is None else server.conductor.absent(number)
    joins = server.run.partition.joins_at
    return {k: member for k, member in server.members.items() if joins(k) <= number and k not in absent}


def _survey(server: Server, after: Checkpoint) -> Survey:
    """The evaluation that clients are asked for after a round; training's parts stay what each holds."""
    run = server.run
    return Survey(
        number=after.state.round,
        run_id=server.start.run_id,
        base_fingerprint=str(server.start.adapter.base_fingerprint),
        depot=_depot(server, after),
        shapes=server.stepper.shapes,
        held=after.holds,
        rows=run.eval.client_rows,
        seed=run.trainer.args.seed,
        timeout=run.round_deadline,
    )


def _global(server: Server, after: Checkpoint) -> Adapter:
    """The global adapter after a round, with its side-car."""
    return server.start.adapter.replace(after.state.adapter, server.stepper.store.read(after.blocks))


def _keep(server: Server, before: Checkpoint, collected: Collected, stepped: Stepped, spool: Spool) -> None:
    """Appends the round to the ledger: updates that counted, with what they weighed."""
    outcomes = {
        o.client_id: replace(o, weight=stepped.weights.get(o.client_id, 0.0)) for o in collected.report.outcomes
    }
    clients = sorted(update.client_id for update in collected.report.updates)
    updates = {update.client_id: update for update in collected.report.updates}
    trained = trained_in(server.run.aggregation.mask, server.run.origin_round(before.state.round + 1))
    names = [name for name in before.state.adapter if trained.covers(name)]
    with spool.reader(clients) as read:
        Ledger(server.folder).keep_round(
            before.state.round + 1,
            before.state.adapter,
            outcomes,
            {client: updates[client].module_norms for client in clients},
            ((client, {name: read(client, name) for name in names}) for client in clients),
        )


def _call(server: Server, before: Checkpoint, number: int) -> Call:
    run, stepper = server.run, server.stepper
    return Call(
        grid=server.grid,
        run=run,
        run_id=server.start.run_id,
        base_fingerprint=str(server.start.adapter.base_fingerprint),
        members=server.members,
        planner=server.planner,
        shapes=stepper.shapes,
        depot=_depot(server, before),
        reads_reference=server.reads_reference,
        mu=_configured(server, before, number),
        reads_losses=isinstance(run.strategy, FlowerStrategy) and run.strategy.reads_losses,
        memories=before.memories,
        released=server.released,
        absent=frozenset() if server.conductor is None else server.conductor.absent(number),
        renew=server.roster.renew,
    )


def _depot(server: Server, present: Checkpoint) -> Depot:
    """What clients are sent of a state."""
    run, stepper = server.run, server.stepper
    return Depot(
        adapter=present.state.adapter,
        blocks=present.blocks,
        start=server.start.adapter.tensors,
        start_blocks=server.start.blocks,
        store=stepper.store,
        scales=stepper.scales,
        halves=run.aggregation.mask != "both" or run.aggregation.gauge == "reset",
        dtype=WIRE_DTYPES[run.trainer.federated.wire_dtype],
    )


def _configured(server: Server, before: Checkpoint, number: int) -> Mapping[int, float] | None:
    """Whom the user's Flower strategy wants of the cohort, and with which mu; None where the strategy is ours."""
    foreign = server.stepper.foreign
    if foreign is None:
        return None
    tasks = [task for task in server.planner.plan(number).tasks if task.role is not Role.IDLE]
    if not tasks:
        return {}
    active = {name: t for name, t in before.state.adapter.items() if tasks[0].trained.covers(name)}
    return foreign.configure(number, active, {task.client_id: server.members[task.client_id].node_id for task in tasks})


def _step(server: Server, before: Checkpoint, collected: Collected, spool: Spool) -> Stepped:
    updates = collected.report.updates
    if server.conductor is not None and server.conductor.steps_itself(before.state.round + 1):
        with spool.reader([update.client_id for update in updates]) as read:
            cohort, capped = weigh(server.stepper, before, collected.report, read)
            return replace(server.conductor.step(before, cohort), capped=capped)
    if not updates:
        return no_step(server.stepper, before)
    with spool.reader([update.client_id for update in updates]) as read:
        return step(server.stepper, before, collected.report, server.roster.nodes, read)


def _result(server: Server, collected: Collected, stepped: Stepped) -> RoundResult:
    """The round's line, but for its seconds."""
    after = stepped.after
    clients = tuple(
        replace(o, weight=stepped.weights.get(o.client_id, 0.0), capped=o.client_id in stepped.capped)
        for o in collected.report.outcomes
    )
    metrics = {**mean_losses(clients), **stepped.figures}
    if stepped.norm is not None:
        metrics["product_norm"] = stepped.norm
    return RoundResult(
        round=after.state.round,
        attempt=collected.attempts,
        adapter_hash=after.adapter_hash,
        seconds=0.0,
        clients=clients,
        metrics=metrics,
        averaged=_averaged(server, after.state.round) if stepped.weights else "",
        aggregation_error=stepped.error,
        notes=(*collected.notes, *step_notes(server.run, after.state.round, stepped)),
    )


def _averaged(server: Server, number: int) -> str:
    conductor = server.conductor
    itself = conductor is not None and conductor.steps_itself(number)
    return type(server.run.method).__name__ if itself else server.stepper.averaged
