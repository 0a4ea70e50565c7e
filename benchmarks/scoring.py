"""Scoring answers: rows in file order with logits everywhere, against score_rows (length-sorted, label rows only, equal rows once).

    python benchmarks/scoring.py [--questions 24] [--threads 1]

Prints seconds of both ways and their ratio, on a random Llama of 14 M parameters with a vocabulary of 32,000 and rows as long
as TOFU's under Llama-3's template (prompts about 58 tokens, answers about 38; the plain answer asked for three times, as by a
suite whose metrics each score for themselves). Both ways in one process, in turn, best of three: compare the ratio, not the seconds.
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedunlearn.data.chat import EncodedRow
from fedunlearn.evals.scoring import score_rows

VOCAB = 32_000
NAIVE_BATCH = 32
BATCH_TOKENS = 4096


def made_up_rows(questions: int, generator: torch.Generator) -> list[EncodedRow]:
    """One plain answer (three times), one paraphrase and five wrong ones a question."""
    rows = []
    for _ in range(questions):
        prompt = _ids(int(torch.randint(46, 71, (1,), generator=generator)), generator)
        answers = [_ids(int(torch.randint(10, 67, (1,), generator=generator)), generator) for _ in range(7)]
        rows += [EncodedRow(prompt + answer, len(prompt)) for answer in (answers[0], answers[0], *answers)]
    return rows


def _ids(count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(1, VOCAB, (count,), generator=generator).tolist())


def naive(model: LlamaForCausalLM, rows: list[EncodedRow]) -> list[float]:
    """File order, fixed batches, the vocabulary projection on every position."""
    losses = []
    for start in range(0, len(rows), NAIVE_BATCH):
        batch = rows[start : start + NAIVE_BATCH]
        width = max(len(row.input_ids) for row in batch)
        ids = torch.tensor([[*row.input_ids, *[0] * (width - len(row.input_ids))] for row in batch])
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in batch])
        labels = ids.masked_fill(mask == 0, -100)
        for i, row in enumerate(batch):
            labels[i, : row.num_prompt] = -100
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        losses += (nll.sum(1) / (labels[:, 1:] != -100).sum(1)).tolist()
    return losses


def best_of(times: int, work: Callable[[], object]) -> float:
    """Shortest of several runs, in seconds."""
    spans = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spans.append(time.perf_counter() - start)
    return min(spans)


def main() -> None:
    """Runs both ways, checks that they agree, prints the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=4,
        num_attention_heads=5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    rows = made_up_rows(args.questions, torch.Generator().manual_seed(0))
    scores = score_rows(model, rows, pad_id=0, batch_tokens=BATCH_TOKENS)
    apart = max(abs(a - b.avg_loss) for a, b in zip(naive(model, rows), scores, strict=True))
    slow = best_of(3, lambda: naive(model, rows))
    fast = best_of(3, lambda: score_rows(model, rows, pad_id=0, batch_tokens=BATCH_TOKENS))
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"{len(rows)} rows ({len(set(rows))} different), {parameters:.1f} M parameters, {args.threads} thread(s), losses apart by {apart:.1e}"
    )
    print(f"plain {slow:.2f} s, score_rows {fast:.2f} s: {slow / fast:.2f} x")


if __name__ == "__main__":
    main()
