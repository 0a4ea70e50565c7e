"""The plan of a client's optimiser steps: which rows meet in which micro-batch, from generators of their own."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedunlearn.config.trainer import TrainArgs
from fedunlearn.errors import UserError
from fedunlearn.records.rounds import WHOLE, Share
from fedunlearn.seeds import seed_of


@dataclass(frozen=True)
class MicroBatch:
    """Row numbers (places in the client's own lists) of one forward: the rows trained on, and the retain rows that meet them when unlearning.

    alternates: for each row which of its alternate answers it meets; empty where there are none.
    """

    rows: tuple[int, ...]
    retain: tuple[int, ...] = ()
    alternates: tuple[int, ...] = ()


Step = tuple[MicroBatch, ...]
MOST_STEPS = 1_000_000


def count_steps(num_rows: int, epochs: float, args: TrainArgs, share: Share = WHOLE) -> int:
    """Optimiser steps of one client in one round: max_steps where it is set, else the share of epochs over `num_rows` rows, rounded up.

    Raises UserError for more than MOST_STEPS of them: their plan is made before the first.
    """
    if args.max_steps > 0:
        return args.max_steps
    steps = share.of(math.ceil(epochs * _steps_per_epoch(num_rows, args) - 1e-9))
    if steps > MOST_STEPS:
        raise UserError(
            f"trainer.args.num_train_epochs (or the protocol's epochs): {epochs:g} epochs over {num_rows} rows are {steps} steps in one round, "
            f"at most {MOST_STEPS} are made: lower them, or raise the batch size"
        )
    return steps


def warmup_of(num_rows: int, num_steps: int, args: TrainArgs) -> int:
    """Warm-up in optimiser steps: warmup_epochs, else warmup_steps (below 1: a fraction of the steps)."""
    if args.warmup_epochs is not None:
        return math.ceil(args.warmup_epochs * _steps_per_epoch(num_rows, args) - 1e-9)
    return math.ceil(args.warmup_steps * num_steps) if args.warmup_steps < 1 else int(args.warmup_steps)


def _steps_per_epoch(num_rows: int, args: TrainArgs) -> int:
    return math.ceil(num_rows / (args.per_device_train_batch_size * args.gradient_accumulation_steps))


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What there is to draw from. rows: trained on, all in each epoch. retain: rows that may meet them, per_row each (0: none).

    alternates: how many alternate answers each row has; empty where the method knows none.
    """

    rows: int
    retain: int = 0
    per_row: int = 0
    alternates: tuple[int, ...] = ()


def plan_steps(supply: Supply, num_steps: int, args: TrainArgs, seed: int) -> Iterator[Step]:
    """Yields `num_steps` steps over freshly shuffled epochs of the rows; an epoch's last step may be smaller.

    Retain rows and alternates are drawn uniformly with replacement. Order, pairing and alternates have a generator each, seeded by
    `seed`, so that none depends on anything else that is drawn.
    """
    order, pairing, choice = (
        torch.Generator().manual_seed(seed_of(seed, name)) for name in ("order", "retain", "alternate")
    )
    size = args.per_device_train_batch_size
    done = 0
    while done < num_steps:
        shuffled = torch.randperm(supply.rows, generator=order).tolist()
        for rows in _chunks(shuffled, size * args.gradient_accumulation_steps):
            if done == num_steps:
                return
            done += 1
            yield tuple(
                MicroBatch(
                    part,
                    _draw([supply.retain] * (len(part) * supply.per_row), pairing),
                    _draw([supply.alternates[row] for row in part] if supply.alternates else [], choice),
                )
                for part in _chunks(rows, size)
            )


def _draw(counts: Sequence[int], generator: torch.Generator) -> tuple[int, ...]:
    return tuple(int(torch.randint(count, (1,), generator=generator)) for count in counts)


def _chunks(items: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])
