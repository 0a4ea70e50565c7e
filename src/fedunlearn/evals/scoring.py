"""The scoring pass: the loss of each answer under the model, teacher-forced, each different context once.

Rows that begin alike share what they share (fedunlearn.evals.branches); the vocabulary projection sees contexts of labels only.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedunlearn.data.chat import EncodedRow
from fedunlearn.errors import UserError
from fedunlearn.evals.branches import Tree, plan_trees, tree_batches
from fedunlearn.evals.inference import inference
from fedunlearn.evals.token_scores import score_contexts
from fedunlearn.models.block_mask import as_given, breadth_of, takes_block_mask
from fedunlearn.models.label_logits import placed_logits
from fedunlearn.records.evaluation import AnswerScore, Compat, Detail, TokenScores
from fedunlearn.reporting.progress import track

# Nodes of one tree. Past it little is left to share, while the mask and eager attention's scores grow with its square.
LONGEST_TREE = 512
NOT_ASKED = -1


def score_rows(
    model: nn.Module,
    wanted: Mapping[EncodedRow, Detail],
    *,
    pad_id: int,
    batch_tokens: int,
    compat: Compat = None,
    names: Mapping[EncodedRow, str] | None = None,
) -> dict[EncodedRow, AnswerScore]:
    """Gives the score of every row, as much of it as is wanted.

    batch_tokens: padded tokens of one batch (a longer row goes alone). Log-softmax in float32 (float64 where the logits are), a row's sum in float64, both
    avg_loss and prob rounded to that dtype again. Neither padding nor order nor what other rows are scored moves a score by more than float32's rounding.
    compat: attention is masked where an id equals pad_id, wherever that is, and positions are 0 .. n-1 all the same; rows then share nothing.
    Nor do they where the model takes no block mask (fedunlearn.models.block_mask says which do).
    names: what a message calls a row, such as "forget10_perturbed row 7". The model's mode and the global random state are left as they were.
    Raises UserError, naming the row, where a loss is not finite.
    """
    batches = plan_batches(model, wanted, batch_tokens=batch_tokens, compat=compat)
    scores: dict[EncodedRow, AnswerScore] = {}
    with inference(model) as device:
        for trees in track(batches, "scoring", len(batches)):
            batch = _lay_out(trees, wanted, pad_id)
            logits = _logits(model, batch, pad_id, device, compat)
            for row, columns in zip(batch.rows, _columns(logits, batch), strict=True):
                scores[row] = _score(columns, wanted[row], (names or {}).get(row, "a row"))
    return scores


def plan_batches(
    model: nn.Module, rows: Collection[EncodedRow], *, batch_tokens: int, compat: Compat = None
) -> list[list[Tree]]:
    """Gives the batches in which score_rows asks the model, longest trees first; each row of its own where it may not share."""
    longest = max((len(row.input_ids) for row in rows), default=0)
    shares = compat is None and takes_block_mask(model, longest)
    limit = min(batch_tokens, LONGEST_TREE)
    return tree_batches(plan_trees(rows, breadth=breadth_of(model) if shares else 0, limit=limit), batch_tokens)


@dataclass(frozen=True)
class _Batch:
    """Trees side by side, padded to T nodes. ids, depths, ends [B, T] int64 as in Tree (a filled place is a tree of its own); real [B, T] bool.

    at [B, T] bool: the N contexts of labels, and detail [N] what is asked of each. branches: whether any tree is more than one path. rows: all rows of the trees; context and label [M]: of
    each of their labels, one row after the other, its place among the N and its id.
    """

    ids: torch.Tensor
    depths: torch.Tensor
    ends: torch.Tensor
    real: torch.Tensor
    at: torch.Tensor
    detail: torch.Tensor
    branches: bool
    rows: list[EncodedRow]
    context: torch.Tensor
    label: torch.Tensor


def _lay_out(trees: Sequence[Tree], wanted: Mapping[EncodedRow, Detail], pad_id: int) -> _Batch:
    width = max(map(len, trees))
    shape = (len(trees), width)
    # Filled by numpy, which reads tuples several times faster than torch does.
    ids, depths, level = np.full(shape, pad_id), np.zeros(shape, np.int64), np.full(shape, NOT_ASKED)
    ends = np.tile(np.arange(1, width + 1), (len(trees), 1))
    contexts: list[int] = []
    for i, tree in enumerate(trees):
        for table, values in (
            (ids, tree.ids),
            (depths, tree.depths),
            (ends, tree.ends),
            (level, _levels(tree, wanted)),
        ):
            table[i, : len(tree)] = values
        contexts += [i * width + node for nodes in tree.contexts for node in nodes]
    at = level != NOT_ASKED
    rows = [row for tree in trees for row in tree.rows]
    return _Batch(
        ids=torch.from_numpy(ids),
        depths=torch.from_numpy(depths),
        ends=torch.from_numpy(ends),
        real=torch.arange(width) < torch.tensor([len(tree) for tree in trees])[:, None],
        at=torch.from_numpy(at),
        detail=torch.from_numpy(level[at]),
        branches=any(not tree.is_path for tree in trees),
        rows=rows,
        context=torch.from_numpy((at.cumsum() - 1)[contexts]),
        label=torch.from_numpy(np.concatenate([row.labels for row in rows])),
    )


def _levels(tree: Tree, wanted: Mapping[EncodedRow, Detail]) -> list[int]:
    """What is asked of each node: the most that any row wants which has a label there."""
    levels = [NOT_ASKED] * len(tree)
    for row, nodes in zip(tree.rows, tree.contexts, strict=True):
        asked = int(wanted[row])
        for node in nodes:
            levels[node] = max(levels[node], asked)
    return levels


def _logits(model: nn.Module, batch: _Batch, pad_id: int, device: torch.device, compat: Compat) -> torch.Tensor:
    """Gives the logits [N, V] at the contexts of labels."""
    ids = batch.ids.to(device)
    if compat is not None:
        mask = ids != pad_id
    elif not batch.branches:
        mask = batch.real.to(device)
    else:
        nodes, ends = torch.arange(ids.shape[1], device=device), batch.ends.to(device)
        mask = as_given(model, (nodes <= nodes[:, None]) & (nodes[:, None] < ends[:, None, :]))
    return placed_logits(model, ids, mask, batch.depths.to(device), batch.at.to(device))


def _columns(logits: torch.Tensor, batch: _Batch) -> Iterator[list[torch.Tensor]]:
    """Gives logp, hit, mu and sigma2 [T] of each row; what was not asked for is 0 or false."""
    found = score_contexts(logits, batch.detail.to(logits.device))
    context, label = batch.context.to(logits.device), batch.label.to(logits.device)
    logp = (logits[context, label].to(found.top.dtype) - found.top[context]) - found.rest[context]
    columns = [logp, found.best[context] == label, found.mu[context], found.sigma2[context]]
    lengths = [row.num_labels for row in batch.rows]
    parts = zip(*(torch.split(column.cpu(), lengths) for column in columns), strict=True)
    yield from map(list, parts)


def _score(columns: Sequence[torch.Tensor], detail: Detail, name: str) -> AnswerScore:
    logp = columns[0]
    mean = -logp.double().mean().to(logp.dtype)
    if not torch.isfinite(mean):
        raise UserError(
            f"{name}: the model gives this answer a loss that is not finite (NaN or infinity in its logits), so no metric has a value; "
            "the adapter has diverged, or torch_dtype=float16 overflows: train it with a lower trainer.args.learning_rate, or evaluate in float32"
        )
    kept = columns[: (0, 2, 4)[detail]]
    tokens = TokenScores(*(column.numpy() for column in kept)) if kept else None
    return AnswerScore(float(mean), float(torch.exp(-mean)), len(logp), tokens)
