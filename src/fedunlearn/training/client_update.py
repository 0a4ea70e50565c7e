"""What one client does in one round: start from the global adapter, train or unlearn on its own rows, give the adapter back."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel

from fedunlearn.config.trainer import TrainArgs
from fedunlearn.errors import UserError
from fedunlearn.methods.tokens import Need
from fedunlearn.models.adapter_tensors import read_tensors, write_tensors
from fedunlearn.models.lora import training_only
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.training.able import check_able
from fedunlearn.training.compiled import compiled_blocks
from fedunlearn.training.local import LocalData, LocalResult, LocalSettings
from fedunlearn.training.loop import Tally, Work, run_steps, unlearning_method
from fedunlearn.training.steps import Step, Supply, count_steps, plan_steps

CarryOut = Callable[[Work, Sequence[Step]], tuple[Tensors, Tally]]
"""Makes the planned steps and gives the adapter they end at."""


def client_update(
    made: Resident,
    start: Tensors,
    data: LocalData,
    task: ClientTask,
    settings: LocalSettings,
    carry_out: CarryOut | None = None,
) -> LocalResult:
    """Trains the resident model's adapter from `start` for one round and gives the new values of both factors, trained or not.

    A fresh optimiser and schedule each time; random numbers only from task.seed (global random state is put back). The model
    is left in eval mode. carry_out: who makes the steps (training.parallel); None: this process. Raises ValueError for an idle task, one without rows, or
    unlearning without a method, UserError for more steps than settings.max_steps, and for what this model or machine cannot do.
    """
    rows = data.forget if task.role.on_forget_rows else data.retain
    if task.role is Role.IDLE or not rows:
        raise ValueError(f"client {task.client_id} has nothing to do as {task.role.value}")
    began = time.monotonic()
    work = Work(made, data, task, settings, start, rows, unlearning_method(task, settings))
    steps = _plan(work)
    reference_tokens = data.tokens + _prepare_sums(work, steps)
    tensors, tally = (carry_out or carry_out_here)(work, steps)
    reference_tokens += tally.reference_tokens
    return _result(tensors, tally, settings.args, reference_tokens, time.monotonic() - began)


def carry_out_here(work: Work, steps: Sequence[Step]) -> tuple[Tensors, Tally]:
    """Makes the steps in this process, from work.start, and gives the adapter they end at. Raises UserError for what this model or machine cannot do."""
    check_able(work.made, work.settings.args)
    model = work.made.model
    write_tensors(model, work.start)
    with _training_mode(model, work.settings.args, work.task):
        tally = run_steps(work, steps, work.task.memory)
    return read_tensors(model), tally


def _plan(work: Work) -> tuple[Step, ...]:
    method, args = work.method, work.settings.args
    if method is not None and method.retain != "none" and not work.data.retain:
        raise ValueError(f"client {work.task.client_id} has no retain row for the retain term {method.retain!r}")
    supply = Supply(
        rows=len(work.rows),
        retain=len(work.data.retain),
        per_row=work.settings.retain_per_forget if method is not None and method.retain != "none" else 0,
        alternates=work.data.alternates.counts if method is not None and work.data.alternates is not None else (),
    )
    count, allowed = count_steps(len(work.rows), work.task.epochs, args, work.task.share), work.settings.max_steps
    if allowed is not None and count > allowed:
        raise UserError(
            f"the task asks for {count} optimiser steps, this client's policy allows {allowed} (policy: max_steps)"
        )
    return tuple(plan_steps(supply, count, args, work.task.seed))


def _prepare_sums(work: Work, steps: Sequence[Step]) -> int:
    """Computes the reference sums that the steps will read and are not known yet; gives the tokens it took."""
    sums = work.data.reference
    if work.method is None or sums is None:
        return 0
    before, parts = sums.tokens, [part for step in steps for part in step]
    rows = [work.rows[index] for part in parts for index in part.rows]
    if Need.ALTERNATES in work.method.needs:
        rows += [row for part in parts for row in work.alternates(part)]
    sums.prepare(rows)
    return sums.tokens - before


def _result(tensors: Tensors, tally: Tally, args: TrainArgs, reference_tokens: int, seconds: float) -> LocalResult:
    losses = torch.tensor(tally.losses, dtype=torch.float64)
    return LocalResult(
        tensors=tensors,
        num_trained=len(tally.trained),
        num_steps=len(tally.losses),
        num_tokens=tally.tokens,
        num_reference_tokens=reference_tokens,
        seconds=seconds,
        loss=float(losses.mean()),
        loss_trace=tuple(float(part.mean()) for part in torch.split(losses, args.logging_steps))
        if tally.losses
        else (),
        memory=tally.memory,
        stopped=tally.stopped,
    )


@contextmanager
def _training_mode(model: PeftModel, args: TrainArgs, task: ClientTask) -> Iterator[None]:
    if args.gradient_checkpointing:
        # it hooks the embeddings too, which non-reentrant checkpointing would not need; a hook of ours beside it would never be removed
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        compiled = compiled_blocks(model) if args.torch_compile else nullcontext()
        with training_only(model, task.trained), torch.random.fork_rng(), compiled:
            torch.manual_seed(task.seed)
            yield
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
        if args.gradient_checkpointing:
            model.get_base_model().activation_checkpointing_disable()
            model.disable_input_require_grads()
