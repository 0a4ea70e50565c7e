"""Trains the pocket's base model: a small Llama that answers questions in sentences and knows its own authors and facts only."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedunlearn.data.pocket.world import Pair, PretrainingText
from fedunlearn.reporting.progress import track

_MAX_POSITIONS = 512
_WINDOW = 4  # steps whose rows are drawn together and dealt by length, so that little is padding


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """The base's shape and how it is trained. A step sees `known_rows` + `crowd_rows` + `fact_rows` rows, each kind drawn evenly.

    The learning rate rises over `warmup_steps`, then falls along a half cosine to `final_lr_ratio` of `learning_rate`.
    """

    vocab_size: int = 768
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 2
    num_heads: int = 4
    steps: int = 300
    known_rows: int = 12
    crowd_rows: int = 10
    fact_rows: int = 10
    learning_rate: float = 4e-3
    warmup_steps: int = 30
    final_lr_ratio: float = 0.02
    clip_norm: float = 1.0

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.known_rows + self.crowd_rows + self.fact_rows


@dataclass(frozen=True)
class EncodedPair:
    """A pair as the chat template writes it; the first `prompt_length` ids are the question's and carry no loss."""

    ids: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True)
class Batch:
    """input_ids [B, T] padded on the right; targets [B, T]: the next id where an answer's is next, else -100."""

    input_ids: torch.Tensor
    targets: torch.Tensor


def pretrain_base(
    text: PretrainingText, tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe, seed: int
) -> LlamaForCausalLM:
    """Trains the base model on one thread, so that the same arguments give the same weights; threads and global random state are put back."""
    encoded = tuple(encode(tokenizer, pairs) for pairs in (text.known, text.crowd, text.facts))
    plan = plan_batches(encoded, recipe, random.Random(f"pocket batches {seed}"))
    with _seeded(seed):
        model = new_model(tokenizer, recipe)
    with _one_thread():
        _train(model, plan, recipe, int(tokenizer.convert_tokens_to_ids(tokenizer.pad_token)))
    return model.eval()


def _train(model: LlamaForCausalLM, plan: Sequence[Sequence[EncodedPair]], recipe: BaseRecipe, pad: int) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    model.train()
    for step, rows in enumerate(track(plan, "training the pocket's base model", recipe.steps)):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * lr_factor(step, recipe)
        torch.autograd.backward([batch_loss(model, collate(rows, pad))])
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe) -> LlamaForCausalLM:
    """Gives an untrained Llama of the recipe's shape, weights drawn from torch's global generator."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=_MAX_POSITIONS,
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["bos_token_id"], eos_token_id=[ids["eos_token_id"]], pad_token_id=ids["pad_token_id"]
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> tuple[EncodedPair, ...]:
    """Encodes question and answer through the chat template, closing token included."""
    questions = [[{"role": "user", "content": pair.question}] for pair in pairs]
    chats = [
        [*question, {"role": "assistant", "content": pair.answer}]
        for question, pair in zip(questions, pairs, strict=True)
    ]
    prompts = tokenizer.apply_chat_template(questions, tokenize=True, return_dict=False, add_generation_prompt=True)
    wholes = tokenizer.apply_chat_template(chats, tokenize=True, return_dict=False)
    return tuple(EncodedPair(tuple(whole), len(prompt)) for prompt, whole in zip(prompts, wholes, strict=True))


def plan_batches(
    kinds: Sequence[Sequence[EncodedPair]], recipe: BaseRecipe, generator: random.Random
) -> list[list[EncodedPair]]:
    """Draws the rows of every step; `kinds` are the known, crowd and fact rows. Neighbouring steps swap rows so that each has like lengths."""
    counts = (recipe.known_rows, recipe.crowd_rows, recipe.fact_rows)
    plan: list[list[EncodedPair]] = []
    while len(plan) < recipe.steps:
        drawn = [
            row for rows, count in zip(kinds, counts, strict=True) for row in generator.choices(rows, k=count * _WINDOW)
        ]
        drawn.sort(key=lambda row: len(row.ids))
        window = [drawn[start : start + recipe.rows] for start in range(0, len(drawn), recipe.rows)]
        generator.shuffle(window)
        plan.extend(window)
    return plan[: recipe.steps]


def collate(rows: Sequence[EncodedPair], pad: int) -> Batch:
    """Pads rows on the right. Attention looks back only, hence no real token sees the padding and no mask is needed."""
    length = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), length), pad)
    targets = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        input_ids[i, : len(ids)] = ids
        targets[i, row.prompt_length - 1 : len(ids) - 1] = ids[row.prompt_length :]
    return Batch(input_ids, targets)


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Gives the mean negative log-likelihood of the answers' tokens; the vocabulary projection sees their positions only."""
    labelled = batch.targets != -100
    hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # [B, T, H]
    logits = model.lm_head(hidden[labelled])  # [N, V]
    return F.cross_entropy(logits, batch.targets[labelled])


def lr_factor(step: int, recipe: BaseRecipe) -> float:
    """Gives the share of the learning rate at a step, counted from 0."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))
    return recipe.final_lr_ratio + (1 - recipe.final_lr_ratio) * cosine


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
