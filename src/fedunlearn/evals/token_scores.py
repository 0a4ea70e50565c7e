"""Scores of tokens from logits, in few passes: what is asked of a context and no more."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedunlearn.records.evaluation import Detail

# Numbers of one chunk: few enough that a chunk stays in a CPU's cache, and on a GPU that it is small beside the logits.
CHUNK = {"cpu": 2**18}
CHUNK_ELSEWHERE = 2**26
LOWEST = -1e15
"""Below what any logit is; finite, and so is its square in float32."""


@dataclass(frozen=True)
class ContextScores:
    """N contexts, each by what it gives the next token; float32, or float64 where the logits are.

    top [N]: the largest logit; rest [N]: log of the sum of exp(logit - top), hence log p(v) = (logit_v - top) - rest. best [N] int64: the likeliest
    token (the first of equals), from Detail.TOKENS on. mu, sigma2 [N]: mean and variance of log p(v) over v ~ p, at Detail.MOMENTS. 0 where not asked for.
    """

    top: torch.Tensor
    rest: torch.Tensor
    best: torch.Tensor
    mu: torch.Tensor
    sigma2: torch.Tensor


def score_contexts(logits: torch.Tensor, detail: torch.Tensor) -> ContextScores:
    """Scores logits [N, V] at the levels detail [N] (of Detail); the logits are left as they are.

    The variance is taken of logit - top, from which log p differs by a constant: nothing large cancels.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    top, rest, mu, sigma2 = (torch.zeros(len(logits), dtype=dtype, device=logits.device) for _ in range(4))
    best = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    for level in Detail:
        for at in _chunks((detail == level).nonzero()[:, 0], logits):
            x = logits[at].to(dtype)
            if level >= Detail.TOKENS:
                top[at], best[at] = x.max(1)
            else:
                top[at] = x.amax(1)
            x -= top[at][:, None]
            if level < Detail.MOMENTS:
                rest[at] = x.exp_().sum(1).log_()
                continue
            p = x.exp()
            x.clamp_(min=LOWEST)  # a token ruled out by -inf has weight 0, and 0 * inf would be NaN
            total = p.sum(1)
            p *= x
            mean = p.sum(1) / total
            p *= x
            rest[at] = total.log()
            mu[at] = mean - rest[at]
            sigma2[at] = p.sum(1) / total - mean.square()
    return ContextScores(top, rest, best, mu, sigma2)


def _chunks(places: torch.Tensor, logits: torch.Tensor) -> Iterator[torch.Tensor]:
    if len(places):
        size = CHUNK.get(logits.device.type, CHUNK_ELSEWHERE)
        yield from torch.split(places, max(1, size // logits.shape[1]))
