"""Scores of contexts against their definitions, and by hand."""

import math

import pytest
import torch

from fedunlearn.evals import token_scores
from fedunlearn.evals.token_scores import score_contexts
from fedunlearn.records.evaluation import Detail


def drawn(rows=50, vocabulary=37, dtype=torch.float64):
    return 6 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0), dtype=dtype) + 40


def test_by_hand():
    """p = (1/2, 1/4, 1/4): mu = -1.5 log 2, sigma2 = log(2)**2 (1/2 + 2 - 9/4) = log(2)**2 / 4."""
    found = score_contexts(torch.tensor([[0.0, -math.log(2), -math.log(2)]], dtype=torch.float64), torch.tensor([2]))
    assert found.top.item() == 0
    assert found.rest.item() == pytest.approx(math.log(2), abs=1e-12)
    assert found.best.item() == 0
    assert found.mu.item() == pytest.approx(-1.5 * math.log(2), abs=1e-12)
    assert found.sigma2.item() == pytest.approx(math.log(2) ** 2 / 4, abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_mixed_details_in_any_chunks_are_the_definitions(monkeypatch, chunk):
    monkeypatch.setattr(token_scores, "CHUNK", {"cpu": chunk})
    logits, detail = drawn(), torch.arange(50) % 3
    before = logits.clone()
    found = score_contexts(logits, detail)
    assert torch.equal(logits, before)
    logp = torch.log_softmax(logits, -1)
    torch.testing.assert_close((logits - found.top[:, None]) - found.rest[:, None], logp, atol=1e-12, rtol=0)
    tokens, moments = detail >= Detail.TOKENS, detail == Detail.MOMENTS
    assert torch.equal(found.best[tokens], logits.argmax(-1)[tokens])
    mu = (logp.exp() * logp).sum(-1)
    sigma2 = (logp.exp() * (logp - mu[:, None]).square()).sum(-1)
    torch.testing.assert_close(found.mu[moments], mu[moments], atol=1e-12, rtol=0)
    torch.testing.assert_close(found.sigma2[moments], sigma2[moments], atol=1e-11, rtol=0)
    assert not found.mu[~moments].any()
    assert not found.best[~tokens].any()


def test_a_token_that_is_ruled_out_weighs_nothing():
    logits = drawn()
    ruled_out = torch.cat([logits, torch.full((50, 1), -math.inf, dtype=torch.float64)], 1)
    found, wanted = (score_contexts(x, torch.full((50,), Detail.MOMENTS)) for x in (ruled_out, logits))
    for column in ("rest", "mu", "sigma2"):
        torch.testing.assert_close(getattr(found, column), getattr(wanted, column), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_logits_are_scored_in_float32(dtype):
    logits = drawn().to(dtype)
    found, wanted = (score_contexts(x, torch.full((50,), 2)) for x in (logits, logits.double()))
    assert found.rest.dtype == found.sigma2.dtype == torch.float32
    for column in ("top", "rest", "mu", "sigma2"):
        torch.testing.assert_close(getattr(found, column).double(), getattr(wanted, column), atol=1e-5, rtol=1e-5)


def test_the_first_of_equals_is_the_likeliest_and_nan_stays_visible():
    found = score_contexts(torch.tensor([[1.0, 3.0, 3.0], [0.0, math.nan, 1.0]]), torch.tensor([1, 0]))
    assert found.best[0] == 1
    assert found.rest[1].isnan()
    assert score_contexts(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).top.shape == (0,)
