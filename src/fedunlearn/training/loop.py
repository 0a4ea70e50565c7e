"""The optimiser steps of one client in one round."""

import functools
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from fedunlearn.data.chat import EncodedRow
from fedunlearn.data.collator import collate
from fedunlearn.methods.base import Method
from fedunlearn.methods.retain import cross_entropy
from fedunlearn.methods.tokens import Memory, Need, StepDone, StepTotals, TokenLosses
from fedunlearn.models.adalora import penalty_weight
from fedunlearn.models.adapter_tensors import live_parameters, live_tensors
from fedunlearn.models.hidden_states import num_blocks
from fedunlearn.models.ranks import module_scales
from fedunlearn.models.resident import Resident
from fedunlearn.records.adapter import Tensors
from fedunlearn.records.rounds import ClientTask, Role
from fedunlearn.training.crew import ALONE, Crew
from fedunlearn.training.forward import OF_REFERENCE, token_losses
from fedunlearn.training.guard import Guard
from fedunlearn.training.local import LocalData, LocalSettings
from fedunlearn.training.optimizer import build_optimizer, build_schedule
from fedunlearn.training.orthogonality import pull_to_orthogonal
from fedunlearn.training.projection import pull_inside
from fedunlearn.training.steps import MicroBatch, Step, warmup_of


@dataclass(frozen=True, eq=False)
class Work:
    """One client's round as the loop sees it. rows: those it trains on. method: what it unlearns by; None where it trains. crew: who shares its steps."""

    made: Resident
    data: LocalData
    task: ClientTask
    settings: LocalSettings
    start: Tensors
    rows: Sequence[EncodedRow]
    method: Method | None
    crew: Crew = ALONE

    @functools.cached_property
    def layer(self) -> int | None:
        """The block whose output is read; None where no hidden state is."""
        if self.method is None or not (self.method.needs | self.method.retain_needs) & {
            Need.HIDDEN,
            Need.REFERENCE_HIDDEN,
        }:
            return None
        return self.method.hidden_layer(num_blocks(self.made.model))

    def alternates(self, part: MicroBatch) -> list[EncodedRow]:
        """The alternate answers that the rows of a micro-batch meet. Raises ValueError where the method wants some and there are none."""
        if self.data.alternates is None:
            raise ValueError(f"client {self.task.client_id} has no alternates")
        return [self.data.alternates.encode(*chosen) for chosen in zip(part.rows, part.alternates, strict=True)]


@dataclass(eq=False)
class Tally:
    """What the steps came to: the loss of each one that was made, tokens with and without gradient, distinct rows, what is remembered.

    stopped: why the guard ended the epoch before its time; empty where it did not.
    """

    memory: Memory
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    reference_tokens: int = 0
    trained: set[int] = field(default_factory=set)
    stopped: str = ""

    def stop(self, why: str, number: int, planned: int) -> bool:
        """Notes why the epoch ends at this step; gives whether it does."""
        self.stopped = f"{why}, at step {number} of {planned}" if why else ""
        return bool(why)


def run_steps(work: Work, steps: Sequence[Step], memory: Memory) -> Tally:
    """Makes the optimiser steps and gives what they came to; the model holds the trained values afterwards."""
    args, task, device = work.settings.args, work.task, work.made.device
    live = live_parameters(work.made.model)
    optimizer = build_optimizer(live, args, task.lr_scale)
    schedule = build_schedule(optimizer, args, len(steps), warmup_of(len(work.rows), len(steps), args))
    work.crew.begin(work.made.model, optimizer, args)
    now = live_tensors(work.made.model)
    start = {name: tensor.to(device) for name, tensor in work.start.items()}
    anchors = _anchors(live, start) if task.mu else {}
    scales = module_scales(work.made.model) if task.radius else {}
    guard, tally = Guard(work.settings.guard, start), Tally(memory)
    weight = penalty_weight(work.made.model)
    for number, step in enumerate(steps, 1):
        done = _backward(work, step, tally)
        tally.trained.update(index for part in step for index in part.rows)
        if tally.stop(guard.judge_loss(done.loss), number, len(steps)):
            break
        tally.losses.append(done.loss)
        pull_to_orthogonal(live, weight)
        if task.mu:
            _pull_to_start(live, anchors, task.mu)
        work.crew.step(optimizer, args)
        schedule.step()
        if task.radius:
            pull_inside(now, start, scales, task.radius)
        if work.method is not None:
            tally.memory = work.method.remember(tally.memory, done.remembered)
        if tally.stop(guard.judge_update(now), number, len(steps)):
            break
    return tally


@dataclass(frozen=True)
class _Done:
    loss: float
    remembered: StepDone


def _backward(work: Work, step: Step, tally: Tally) -> _Done:
    """Runs forward and backward of one step, micro-batch after micro-batch, forget and retain term one after the other."""
    rows = [work.rows[index] for part in step for index in part.rows]
    kept = [work.data.retain[index] for part in step for index in part.retain]
    totals, retain_totals = (_totals(work, which) for which in (rows, kept))
    loss, retain = 0.0, 0.0
    for part in step:
        mine = work.crew.deal(part)
        loss += _forget_term(work, mine.part, totals, tally, mine.of_rows)
        retain += _retain_term(work, mine.part, retain_totals, tally, mine.of_retain)
    loss, retain = work.crew.add_up(work.made.model, (loss, retain))
    weight = work.method.retain_weight(tally.memory) if work.method is not None and kept else 0.0
    remembered = StepDone(retain=retain if kept else None, num_rows=len(rows), num_forget=len(work.rows))
    return _Done(loss + weight * retain, remembered)


def _totals(work: Work, rows: Sequence[EncodedRow]) -> StepTotals:
    return StepTotals(num_labels=tuple(row.num_labels for row in rows), seed=work.settings.args.seed)


def _forget_term(work: Work, part: MicroBatch, totals: StepTotals, tally: Tally, counts: int) -> float:
    """Gives this micro-batch's share of gamma F (or of the cross-entropy where the client trains), after its backward. counts: see Dealt."""
    method, rows = work.method, [work.rows[index] for index in part.rows]
    if method is None:
        losses = _losses(work, rows, frozenset({Need.NLL}), tally, counts)
        return _down(work, counts * cross_entropy(losses, totals))
    other = None
    if Need.ALTERNATES in method.needs:
        other = _losses(work, work.alternates(part), method.needs, tally, counts)
    losses = _losses(work, rows, method.needs, tally, counts, other)
    return _down(work, counts * method.gamma * method.forget(losses, totals))


def _retain_term(work: Work, part: MicroBatch, totals: StepTotals, tally: Tally, counts: int) -> float:
    """Gives this micro-batch's share of R, after the backward of its weighted value; 0 where there is no retain term."""
    method = work.method
    if method is None or not part.retain:
        return 0.0
    losses = _losses(work, [work.data.retain[index] for index in part.retain], method.retain_needs, tally, counts)
    share = counts * method.retain_loss(losses, totals)
    _down(work, method.retain_weight(tally.memory) * share)
    return float(share.detach())


def _losses(
    work: Work,
    rows: Sequence[EncodedRow],
    needs: Set[Need],
    tally: Tally,
    counts: int,
    other: TokenLosses | None = None,
) -> TokenLosses:
    made, sums = work.made, None
    batch = collate(rows, work.settings.collator, made.chat.pad_id, made.device)
    if Need.REFERENCE_SUMS in needs and work.data.reference is not None:
        sums = work.data.reference.of(rows).to(made.device)
    tokens = counts * sum(len(row.input_ids) for row in rows)
    tally.tokens += tokens
    tally.reference_tokens += tokens if needs & OF_REFERENCE else 0
    with torch.autocast(made.device.type, dtype=torch.bfloat16, enabled=work.settings.args.bf16):
        return token_losses(made.model, batch, needs, layer=work.layer, reference_sums=sums, alternates=other)


def _down(work: Work, loss: torch.Tensor) -> float:
    work.crew.backward(loss)
    return float(loss.detach())


def _anchors(live: Mapping[str, nn.Parameter], start: Tensors) -> Mapping[str, torch.Tensor]:
    """Gives what every trained parameter is before the first step: a tensor of `start`, or a copy where fused experts are one parameter."""
    return {name: start[name] if name in start else p.detach().clone() for name, p in live.items()}


def _pull_to_start(live: Mapping[str, nn.Parameter], anchors: Mapping[str, torch.Tensor], mu: float) -> None:
    """Adds the gradient of (mu/2) ||w - x||^2 (FedProx), x the adapter the round began with."""
    for name, parameter in live.items():
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchors[name], alpha=mu)


def unlearning_method(task: ClientTask, settings: LocalSettings) -> Method | None:
    """Gives the method where the task is to unlearn. Raises ValueError where there is none then."""
    if task.role is not Role.UNLEARN:
        return None
    if settings.method is None:
        raise ValueError(f"client {task.client_id} is to unlearn without a method")
    return settings.method
