"""What one client does in one round: start from the global adapter, train or unlearn on its own rows, give the adapter back."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from peft import PeftModel

from fedunlearn.config.data import CollatorConfig
from fedunlearn.config.trainer import TrainArgs
from fedunlearn.data.chat import EncodedRow
from fedunlearn.data.collator import Batch, collate
from fedunlearn.methods.base import Method, Need, StepTotals, TokenLosses
from fedunlearn.methods.retain import cross_entropy, retain_loss, retain_needs
from fedunlearn.models.lora import live_parameters, read_tensors, training_only, write_tensors
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.training.forward import token_losses
from fedunlearn.training.optimizer import build_optimizer, build_schedule
from fedunlearn.training.steps import MicroBatch, Step, count_steps, plan_steps, warmup_of

LossOf = Callable[[TokenLosses], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class LocalData:
    """A client's own tokenised rows, split by the request; reference_sums: [forget rows] float32, where the method needs them."""

    forget: tuple[EncodedRow, ...]
    retain: tuple[EncodedRow, ...]
    reference_sums: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """How a client trains; the same for all clients of a run."""

    args: TrainArgs
    collator: CollatorConfig
    method: Method | None
    retain_per_forget: int = 1


@dataclass(frozen=True, kw_only=True)
class LocalResult:
    """The trained adapter and its account. num_trained: distinct rows trained on (unlearn: its forget rows); tokens: input tokens seen.

    loss: mean over optimiser steps; loss_trace: its mean over every args.logging_steps steps.
    """

    tensors: Tensors
    num_trained: int
    num_steps: int
    num_tokens: int
    seconds: float
    loss: float
    loss_trace: tuple[float, ...]


def client_update(
    made: Resident, start: Tensors, data: LocalData, task: ClientTask, settings: LocalSettings
) -> LocalResult:
    """Trains the resident model's adapter from `start` for one round and gives the new values of both factors, trained or not.

    A fresh optimiser and schedule each time; random numbers only from task.seed (global random state is put back). The model
    is left in eval mode. Raises ValueError for an idle task, one without rows, or unlearning without a method.
    """
    rows = data.forget if task.role is Role.UNLEARN else data.retain
    if task.role is Role.IDLE or not rows:
        raise ValueError(f"client {task.client_id} has nothing to do as {task.role.value}")
    if task.role is Role.UNLEARN and settings.method is None:
        raise ValueError(f"client {task.client_id} is to unlearn without a method")
    began = time.monotonic()
    num_steps = count_steps(len(rows), task.epochs, settings.args)
    write_tensors(made.model, start)
    with _training_mode(made.model, settings.args, task):
        losses, tokens, num_trained = _run(_Loop(made, data, rows, task, settings, start), num_steps)
    trace = torch.split(losses, settings.args.logging_steps)
    return LocalResult(
        tensors=read_tensors(made.model),
        num_trained=num_trained,
        num_steps=num_steps,
        num_tokens=tokens,
        seconds=time.monotonic() - began,
        loss=float(losses.mean()),
        loss_trace=tuple(float(part.mean()) for part in trace),
    )


@contextmanager
def _training_mode(model: PeftModel, args: TrainArgs, task: ClientTask) -> Iterator[None]:
    if args.gradient_checkpointing:
        # it hooks the embeddings so that inputs carry a gradient; a hook of ours beside it would never be removed
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        with training_only(model, task.trained), torch.random.fork_rng():
            torch.manual_seed(task.seed)
            yield
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()
        if args.gradient_checkpointing:
            model.get_base_model().activation_checkpointing_disable()
            model.disable_input_require_grads()


@functools.cache
def _accelerator(device: str) -> Accelerator:
    return Accelerator(cpu=device == "cpu")


@dataclass(frozen=True, eq=False)
class _Loop:
    made: Resident
    data: LocalData
    rows: Sequence[EncodedRow]
    task: ClientTask
    settings: LocalSettings
    start: Tensors

    @property
    def per_row(self) -> int:
        method = self.settings.method
        unlearns = self.task.role is Role.UNLEARN and method is not None and method.retain != "none"
        return self.settings.retain_per_forget if unlearns else 0

    def batch(self, rows: Sequence[EncodedRow]) -> Batch:
        return collate(rows, self.settings.collator, self.made.chat.pad_id, self.made.device)


def _run(loop: _Loop, num_steps: int) -> tuple[torch.Tensor, int, int]:
    """Gives the loss of every optimiser step [num_steps] float64, the input tokens seen and the distinct rows trained on."""
    args = loop.settings.args
    live = live_parameters(loop.made.model)
    parameters = list(live.values())
    optimizer = build_optimizer(parameters, args, loop.task.lr_scale)
    schedule = build_schedule(optimizer, args, num_steps, warmup_of(len(loop.rows), num_steps, args))
    accelerator = _accelerator(loop.made.device.type)
    start = {name: tensor.to(loop.made.device) for name, tensor in loop.start.items()} if loop.task.mu else {}
    losses, tokens, trained = [], 0, set[int]()
    for step in plan_steps(len(loop.rows), len(loop.data.retain), loop.per_row, num_steps, args, loop.task.seed):
        totals = _totals(loop, step)
        losses.append(sum(_backward(loop, part, totals, accelerator) for part in step))
        tokens += sum(len(row.input_ids) for part in step for row in _rows_of(loop, part))
        trained.update(index for part in step for index in part.rows)
        if loop.task.mu:
            _pull_to_start(live, start, loop.task.mu)
        if args.max_grad_norm > 0:
            accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.tensor(losses, dtype=torch.float64), tokens, len(trained)


@dataclass(frozen=True)
class _Totals:
    rows: StepTotals
    retain: StepTotals


def _totals(loop: _Loop, step: Step) -> _Totals:
    rows = [loop.rows[index] for part in step for index in part.rows]
    retain = [loop.data.retain[index] for part in step for index in part.retain]
    return _Totals(_count(rows), _count(retain))


def _count(rows: Sequence[EncodedRow]) -> StepTotals:
    return StepTotals(num_rows=len(rows), num_tokens=sum(len(row.input_ids) - row.num_prompt for row in rows))


def _rows_of(loop: _Loop, part: MicroBatch) -> list[EncodedRow]:
    return [*(loop.rows[index] for index in part.rows), *(loop.data.retain[index] for index in part.retain)]


def _backward(loop: _Loop, part: MicroBatch, totals: _Totals, accelerator: Accelerator) -> float:
    """Runs forward and backward of one micro-batch, forget and retain one after the other, and gives its share of the step's loss."""
    method = loop.settings.method
    rows = [loop.rows[index] for index in part.rows]
    if loop.task.role is Role.FINETUNE or method is None:
        return _one_term(loop, rows, accelerator, lambda losses: cross_entropy(losses, totals.rows), frozenset())
    sums = None if loop.data.reference_sums is None else loop.data.reference_sums[list(part.rows)]
    total = _one_term(
        loop, rows, accelerator, lambda losses: method.gamma * method.forget(losses, totals.rows), method.needs, sums
    )
    if part.retain:
        kept = [loop.data.retain[index] for index in part.retain]
        term = method.retain
        total += _one_term(
            loop,
            kept,
            accelerator,
            lambda losses: method.alpha * retain_loss(term, losses, totals.retain),
            retain_needs(term),
        )
    return total


def _one_term(
    loop: _Loop,
    rows: Sequence[EncodedRow],
    accelerator: Accelerator,
    loss_of: LossOf,
    needs: Set[Need],
    sums: torch.Tensor | None = None,
) -> float:
    device = loop.made.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=loop.settings.args.bf16):
        losses = token_losses(loop.made.model, loop.batch(rows), needs, None if sums is None else sums.to(device))
    loss = loss_of(losses)
    accelerator.backward(loss)
    return float(loss.detach())


def _pull_to_start(live: Mapping[str, torch.nn.Parameter], start: Tensors, mu: float) -> None:
    """Adds the gradient of (mu/2) ||w - x||^2 (FedProx), x the adapter the round began with."""
    for name, parameter in live.items():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - start[name], alpha=mu)
