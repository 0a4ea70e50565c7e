"""The plain way to evaluate, as open-unlearning goes it: each metric for itself, a sequence a row and answer, batches in file order, logits everywhere.

Only what costs is here: forward passes and what is made of their logits. Written for benchmarks/evaluation.py, from the description of
open-unlearning's metrics; mia_gradnorm, which needs a backward pass, is left out of both ways.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from evaluation_data import Asked, Case

from fedunlearn.data.chat import EncodedRow

BATCH = 32
MAX_NEW_TOKENS = 200
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Work = Callable[[torch.Tensor, Batch], list]


def batches(rows: list[EncodedRow]) -> Iterator[Batch]:
    """ids, mask and labels [B, T] in file order, padded on the right."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        width = max(len(row.input_ids) for row in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
            mask[i, : len(row.input_ids)] = 1
        labels = ids.masked_fill(mask == 0, -100)
        for i, row in enumerate(batch):
            labels[i, : row.num_prompt] = -100
        yield ids, mask, labels


def losses(logits: torch.Tensor, batch: Batch) -> list[float]:
    """avg_loss of each row."""
    labels = batch[2][:, 1:]
    nll = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    return (nll.view(labels.shape).sum(1) / (labels != -100).sum(1)).tolist()


def by_label(values: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """values [B, T - 1, ...] at the labels of each row, the last one left out."""
    return [row[(labels != -100).nonzero()[:-1, 0]] for row, labels in zip(values, batch[2][:, 1:], strict=True)]


def token_logps(logits: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    logp = torch.log_softmax(logits, dim=-1)[:, :-1]
    return by_label(logp.gather(2, batch[0][:, 1:, None])[..., 0], batch)


def hits(logits: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    logp = torch.log_softmax(logits, dim=-1)[:, :-1]
    labels = by_label(batch[2][:, 1:], batch)
    return [row.argmax(-1) == label for row, label in zip(by_label(logp, batch), labels, strict=True)]


def moments(logits: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
    """mu and sigma2 [2, T] of each row."""
    found = []
    for logp in by_label(torch.log_softmax(logits, dim=-1)[:, :-1], batch):
        mu = (torch.exp(logp) * logp).sum(-1)
        found.append(torch.stack([mu, (torch.exp(logp) * torch.square(logp)).sum(-1) - torch.square(mu)]))
    return found


# What is asked of plain answers, one pass each. Base: probability, extraction strength (forget only), min-k.
# All attacks, besides: exact memorization (forget only), loss, zlib, min-k++ (which asks twice), the reference attack (this model and the other).
FORGET_BASE: tuple[Work, ...] = (losses, hits, token_logps)
HOLDOUT_BASE: tuple[Work, ...] = (token_logps,)
ATTACKS: tuple[Work, ...] = (losses, losses, moments, token_logps, losses, losses)


def passes(sets: tuple[Asked, ...], attacks: bool) -> list[tuple[str, list[EncodedRow], Work]]:
    """Every pass over the data: a name for its results, its rows, and what it makes of logits."""
    forget, *others, holdout = sets
    found = [(f"plain {work.__name__}", forget.plain, work) for work in FORGET_BASE]
    found += [(f"holdout {work.__name__}", holdout.plain, work) for work in HOLDOUT_BASE]
    found += [("losses", asked.plain, losses) for asked in others]
    for asked in (forget, *others):
        found += [("losses", list(rows), losses) for rows in list(zip(*asked.rows, strict=True))[1:]]
    if attacks:
        found += [("plain hits", forget.plain, hits)]
        for name, asked in (("plain", forget), ("holdout", holdout)):
            found += [(f"{name} {work.__name__}", asked.plain, work) for work in ATTACKS]
    return found


def score(case: Case, attacks: bool) -> None:
    """Runs all passes."""
    for _, rows, work in passes(case.sets, attacks):
        run(case, rows, work)


def run(case: Case, rows: list[EncodedRow], work: Work, exact: bool = False) -> list:
    """One pass: what it makes of each row. exact: in float64 from the logits on, where mu**2 is taken off a number as large."""
    made: list = []
    for batch in batches(rows):
        with torch.no_grad():
            logits = case.model(input_ids=batch[0], attention_mask=batch[1], use_cache=False).logits
        made += work(logits.double() if exact else logits, batch)
    return made


def padded_positions(sets: tuple[Asked, ...], attacks: bool = False) -> int:
    """Places of all batches of all passes."""
    total = 0
    for _, rows, _ in passes(sets, attacks):
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            total += len(batch) * max(len(row.input_ids) for row in batch)
    return total


def generate(case: Case) -> list[list[int]]:
    """New ids of each prompt, in file order, each batch up to its longest answer; cut after the first id that ends one."""
    config = case.model.generation_config
    config.max_new_tokens, config.pad_token_id, config.eos_token_id = MAX_NEW_TOKENS, 0, list(case.stop)
    found: list[list[int]] = []
    for start in range(0, len(case.prompts), BATCH):
        batch = case.prompts[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        found += case.model.generate(input_ids=ids, attention_mask=mask)[:, width:].tolist()
    ends = [next((i + 1 for i, token in enumerate(ids) if token in case.stop), len(ids)) for ids in found]
    return [ids[:end] for ids, end in zip(found, ends, strict=True)]


def gradient_norms(case: Case, rows: list[EncodedRow]) -> list[float]:
    """One row at a time: full logits, backward into every parameter's grad, the mean of the norms; the last label left out."""
    found = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        logits = case.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        labels = ids[0, 1:].clone()
        labels[: row.num_prompt - 1] = labels[-1] = -100
        case.model.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100).backward()
        norms = [parameter.grad.norm() for parameter in case.model.parameters() if parameter.grad is not None]
        found.append(float(torch.stack(norms).mean()))
    case.model.zero_grad()
    return found
