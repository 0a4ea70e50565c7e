"""The generation pass: greedy (or sampled) answers to prompts, in left-padded batches of similar length, and the texts they decode to."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessorList

from fedunlearn.data.chat import ChatFormat
from fedunlearn.errors import UserError
from fedunlearn.evals.greedy import Decoder, Ids, NotFiniteError, check_finite, is_plainly_greedy
from fedunlearn.evals.inference import inference
from fedunlearn.models.inner import inner_model
from fedunlearn.records.evaluation import Compat
from fedunlearn.reporting.progress import track

CLEANED = (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")  # fmt: skip
PLAIN: dict[str, Any] = {
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "typical_p": None,
    "epsilon_cutoff": None,
    "eta_cutoff": None,
    "num_return_sequences": None,
    "max_length": None,
    "min_length": None,
    "use_cache": True,
}
GREEDY: dict[str, Any] = {**PLAIN, "do_sample": False}
SAMPLED: dict[str, Any] = {**PLAIN, "do_sample": True, "temperature": 1.0}

SHOWN_CHARACTERS = 80
Padded = Callable[[Sequence[Ids]], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Draw:
    """A sampled answer and its length in tokens, the closing one included."""

    text: str
    tokens: int


def clean(text: str) -> str:
    """Takes the blank before punctuation and contractions out, in the order of transformers 4's clean_up_tokenization.

    Written out because transformers 5 skips it for BPE tokenizers, and the published generations have it.
    """
    for spaced, closed in CLEANED:
        text = text.replace(spaced, closed)
    return text


def generate_texts(
    model: nn.Module,
    chat: ChatFormat,
    prompts: Sequence[Ids],
    *,
    batch_size: int,
    max_new_tokens: int,
    compat: Compat = None,
    stops: Sequence[str] = (),
) -> tuple[str, ...]:
    """Gives the greedy continuation of each prompt, decoded without special tokens, cleaned and stripped; equal prompts once.

    A row stops, and leaves its batch, at any eos id of the model's generation_config (the tokenizer's, where it names none). Sampling settings of that config
    do not act; its repetition_penalty does, as in the published numbers.
    compat: a prompt's ids that equal the pad id are masked too, and positions counted over the others.
    stops: texts before which the decoded continuation is cut, one after the other, before it is stripped.
    """
    found = generate_ids(model, chat, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens, compat=compat)
    texts = {prompt: cut_before(decode(chat, ids), stops).strip() for prompt, ids in found.items()}
    return tuple(texts[prompt] for prompt in prompts)


def generate_ids(
    model: nn.Module,
    chat: ChatFormat,
    prompts: Sequence[Ids],
    *,
    batch_size: int,
    max_new_tokens: int,
    compat: Compat = None,
) -> dict[Ids, Ids]:
    """Gives the new ids behind generate_texts for each different prompt, up to and with the first eos."""
    unique = sorted(dict.fromkeys(prompts), key=len, reverse=True)
    with inference(model) as device, _generating(model, chat, GREEDY, max_new_tokens) as eos_ids:
        padded = partial(_padded, pad_id=chat.pad_id, device=device, compat=compat)
        inner = inner_model(model)
        if is_plainly_greedy(inner):
            penalty = inner.generation_config.repetition_penalty or 1.0
            answers = Decoder(inner, padded, eos_ids, max_new_tokens, penalty).run(unique, batch_size)
        else:
            answers = _by_generate(inner, padded, unique, batch_size)
        done = track(answers, "generating", len(unique))
        with _named(chat, unique):
            return {unique[place]: tuple(_up_to_eos(ids, eos_ids)) for place, ids in done}


def _by_generate(inner: Any, padded: Padded, prompts: Sequence[Ids], batch_size: int) -> Iterator[tuple[int, Ids]]:
    """Gives each prompt's place and new ids, what fills its row up included."""
    for start in range(0, len(prompts), batch_size):
        ids, mask = padded(prompts[start : start + batch_size])
        checked = LogitsProcessorList([partial(_checked, range(start, start + len(ids)))])
        output = inner.generate(input_ids=ids, attention_mask=mask, logits_processor=checked)
        for i, new in enumerate(output[:, ids.shape[1] :].tolist()):
            yield start + i, tuple(new)


def _checked(places: Sequence[int], input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Gives scores [B x beams, V] as they are; see check_finite."""
    check_finite(scores.amax(-1).view(len(places), -1).amax(-1), places)
    return scores


@contextmanager
def _named(chat: ChatFormat, prompts: Sequence[Ids]) -> Iterator[None]:
    """Says which prompt it was that a model's logits are not finite for."""
    try:
        yield
    except NotFiniteError as error:
        asked = decode(chat, prompts[error.place]).strip()[-SHOWN_CHARACTERS:]
        raise UserError(
            f"the prompt that ends in {asked!r}: the model's logits are not finite (NaN or infinity), so it says nothing; the model is broken, or its training diverged"
        ) from error


def sample_texts(
    model: nn.Module, chat: ChatFormat, prompt: Ids, *, count: int, max_new_tokens: int, seed: int
) -> tuple[Draw, ...]:
    """Gives `count` continuations of one prompt drawn from the whole distribution at temperature 1, as texts like generate_texts'.

    Random numbers come from `seed` alone; global random state is put back.
    """
    with (
        inference(model) as device,
        _generating(model, chat, SAMPLED, max_new_tokens) as eos_ids,
        torch.random.fork_rng(),
    ):
        torch.manual_seed(seed)
        padded = partial(_padded, pad_id=chat.pad_id, device=device, compat=None)
        drawn = _by_generate(inner_model(model), padded, [prompt] * count, count)
        with _named(chat, [prompt] * count):
            answers = [_up_to_eos(ids, eos_ids) for _, ids in drawn]
    return tuple(Draw(decode(chat, ids).strip(), len(ids)) for ids in answers)


def cut_before(text: str, stops: Sequence[str]) -> str:
    """What stands before the first place of each of the stops."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def decode(chat: ChatFormat, ids: Sequence[int]) -> str:
    """Ids as cleaned text without special tokens; not stripped."""
    return clean(str(chat.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)))


def _padded(
    prompts: Sequence[Ids], pad_id: int, device: torch.device, compat: Compat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives ids and mask [B, T], padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    if compat is not None:
        mask = (ids != pad_id).long()
    return ids.to(device), mask.to(device)


def _up_to_eos(ids: Sequence[int], eos_ids: frozenset[int]) -> Sequence[int]:
    """Drops what fills a row up after its first eos; a pad id that is no special token would else be decoded."""
    ends = [place for place, token in enumerate(ids) if token in eos_ids]
    return ids[: ends[0] + 1] if ends else ids


@contextmanager
def _generating(
    model: nn.Module, chat: ChatFormat, settings: dict[str, Any], max_new_tokens: int
) -> Iterator[frozenset[int]]:
    """Swaps in a copy of the model's generation_config with these settings and gives its eos ids; the model's own comes back afterwards.

    Swapped, and not handed to generate(): that fills what is None there from the model's own config, sampling settings included.
    """
    inner = inner_model(model)
    before = inner.generation_config
    config = copy.deepcopy(before)
    for name, value in settings.items():
        setattr(config, name, value)
    eos = config.eos_token_id if config.eos_token_id is not None else chat.tokenizer.eos_token_id
    config.eos_token_id, config.pad_token_id, config.max_new_tokens = eos, chat.pad_id, max_new_tokens
    inner.generation_config = config
    try:
        yield frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
    finally:
        inner.generation_config = before
