"""The scoring pass: the loss of each answer under the model, teacher-forced, each different row once.

Rows are sorted by length and batched by a budget of padded tokens; the vocabulary projection sees label rows only.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fedunlearn.data.chat import EncodedRow
from fedunlearn.errors import UserError
from fedunlearn.evals.inference import inference
from fedunlearn.models.label_logits import label_logits
from fedunlearn.records.evaluation import AnswerScore, Compat, Detail, TokenScores
from fedunlearn.reporting.progress import track

LABELS_AT_ONCE = 1024


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
    avg_loss and prob rounded to that dtype again. Neither padding nor order moves a score by more than float32's rounding.
    compat: attention is masked where an id equals pad_id, wherever that is, and positions are 0 .. n-1 all the same.
    The model's mode and the global random state are left as they were. Raises UserError where a loss is not finite.
    """
    unique = sorted(wanted, key=lambda row: len(row.input_ids), reverse=True)
    scores: dict[EncodedRow, AnswerScore] = {}
    with inference(model) as device:
        for batch in track(
            token_batches(unique, batch_tokens), "scoring", len(list(token_batches(unique, batch_tokens)))
        ):
            scores.update(zip(batch, _score_batch(model, batch, wanted, pad_id, device, compat), strict=True))
    return scores


def token_batches(rows: Sequence[EncodedRow], batch_tokens: int) -> Iterator[list[EncodedRow]]:
    """Cuts rows, sorted longest first, into batches of at most batch_tokens padded tokens, and at least one row."""
    start = 0
    while start < len(rows):
        count = max(1, batch_tokens // len(rows[start].input_ids))
        yield list(rows[start : start + count])
        start += count


def _score_batch(
    model: nn.Module,
    batch: list[EncodedRow],
    detail: Mapping[EncodedRow, Detail],
    pad_id: int,
    device: torch.device,
    compat: Compat,
) -> list[AnswerScore]:
    width = max(len(row.input_ids) for row in batch)
    ids = torch.full((len(batch), width), pad_id)
    real = torch.zeros(len(batch), width, dtype=torch.bool)
    wanted = torch.zeros(len(batch), width, dtype=torch.bool)
    for i, row in enumerate(batch):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        real[i, : len(row.input_ids)] = True
        wanted[i, row.num_prompt - 1 : len(row.input_ids) - 1] = True
    labels = torch.tensor([label for row in batch for label in row.labels], device=device)  # [N]
    if compat is None:
        logits = label_logits(model, ids.to(device), real.to(device), wanted.to(device))  # [N, V]
    else:
        with _positions_from_zero(model):
            logits = label_logits(model, ids.to(device), (ids != pad_id).to(device), wanted.to(device))
    columns = _columns(logits, labels, max(detail[row] for row in batch))
    parts = zip(*(torch.split(column.cpu(), [row.num_labels for row in batch]) for column in columns), strict=True)
    return [_score(tuple(part), detail[row]) for row, part in zip(batch, parts, strict=True)]


def _columns(logits: torch.Tensor, labels: torch.Tensor, detail: Detail) -> list[torch.Tensor]:
    """Gives logp, hit, mu and sigma2 [N], as far as `detail` goes; LABELS_AT_ONCE rows of logits are looked at at a time."""
    chunks = zip(torch.split(logits, LABELS_AT_ONCE), torch.split(labels, LABELS_AT_ONCE), strict=True)
    found = [_chunk(part, target, detail) for part, target in chunks]
    return [torch.cat(column) for column in zip(*found, strict=True)]


def _chunk(logits: torch.Tensor, labels: torch.Tensor, detail: Detail) -> list[torch.Tensor]:
    logp = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    found = [logp.gather(1, labels[:, None])[:, 0]]
    if detail >= Detail.TOKENS:
        found.append(logp.argmax(1) == labels)
    if detail >= Detail.MOMENTS:
        p = logp.exp()
        mu = (p * logp).sum(1)
        found += [mu, (p * logp.square()).sum(1) - mu.square()]
    return found


def _score(columns: tuple[torch.Tensor, ...], detail: Detail) -> AnswerScore:
    logp = columns[0]
    mean = -logp.double().mean().to(logp.dtype)
    if not torch.isfinite(mean):
        raise UserError(
            "the model gives an answer a loss that is not finite (NaN or infinity in its logits), so no metric has a value; "
            "the adapter has diverged, or torch_dtype=float16 overflows: train it with a lower trainer.args.learning_rate, or evaluate in float32"
        )
    kept = columns[: (0, 2, 4)[detail]]
    tokens = TokenScores(*(column.numpy() for column in kept)) if kept else None
    return AnswerScore(float(mean), float(torch.exp(-mean)), len(logp), tokens)


@contextmanager
def _positions_from_zero(model: nn.Module) -> Iterator[None]:
    """Lets the model count positions over all ids of a row, masked ones too."""

    def renumber(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = kwargs["input_ids"]
        return args, {**kwargs, "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids)}

    handle = model.register_forward_pre_hook(renumber, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
