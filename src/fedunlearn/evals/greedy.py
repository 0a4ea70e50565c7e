"""Greedy decoding whose finished rows leave the batch: what generate() gives, without running ended answers on to the longest's end."""

import inspect
from collections.abc import Set
from typing import Any

import torch
from transformers import DynamicCache

# What may be set in a generation_config here: the loop below obeys these, or they do not touch the tokens.
OBEYED = frozenset(
    {
        "do_sample", "eos_token_id", "max_new_tokens", "pad_token_id", "repetition_penalty", "use_cache",
        "bos_token_id", "output_attentions", "output_hidden_states", "transformers_version", "_from_model_config",
    }
)  # fmt: skip
NEEDED = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})


def is_plainly_greedy(inner: Any) -> bool:
    """Says whether continue_greedily gives this transformer's generate(): its generation_config sets nothing else, and it keeps keys and values only.

    Otherwise (state of another kind, a forced or suppressed token, beams, a cache of its own choice) generate() itself is to be asked.
    """
    config = inner.generation_config
    if config.do_sample or not set(config.to_diff_dict()) <= OBEYED:
        return False
    if getattr(inner, "_is_stateful", True) or inner.config.is_encoder_decoder:
        return False
    layers = set(getattr(inner.config.get_text_config(), "layer_types", None) or ())
    return (
        layers <= {"full_attention", "sliding_attention"} and set(inspect.signature(inner.forward).parameters) >= NEEDED
    )


def continue_greedily(inner: Any, ids: torch.Tensor, mask: torch.Tensor, eos_ids: Set[int]) -> list[list[int]]:
    """Gives the new ids of each row, up to and with its first eos id, at most generation_config.max_new_tokens.

    ids, mask [B, T]: prompts padded on the left, 1 where a token is seen. Positions are counted over seen tokens, and a repetition penalty
    acts on all ids of a row from its first seen one on: both as in generate().
    """
    config = inner.generation_config
    penalty = config.repetition_penalty or 1.0
    padding = (mask != 0).int().argmax(1)
    ends = torch.tensor(sorted(eos_ids), device=ids.device)
    found: list[list[int]] = [[] for _ in ids]
    rows = list(range(len(ids)))
    cache = DynamicCache(config=inner.config)
    step, positions = ids, (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    for _ in range(config.max_new_tokens):
        logits = (
            inner(
                input_ids=step,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )  # [B, V]
        chosen = (logits if penalty == 1 else _penalised(logits, ids, padding, penalty)).argmax(-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            found[row].append(token)
        going = ~torch.isin(chosen, ends)
        ids, step, positions = torch.cat([ids, chosen[:, None]], 1), chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(step)], 1)
        if not going.all():
            rows = [row for row, goes in zip(rows, going.tolist(), strict=True) if goes]
            if not rows:
                break
            cache.batch_select_indices(going.nonzero()[:, 0])
            ids, mask, step, positions = ids[going], mask[going], step[going], positions[going]
            padding = padding[going]
    return found


def _penalised(logits: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive logits [B, V] of ids [B, T] met before by the penalty and multiplies negative ones; the first padding [B] ids do not count."""
    places = torch.arange(ids.shape[1], device=ids.device)
    spare = logits.shape[1]
    met = torch.zeros(len(logits), spare + 1, dtype=torch.bool, device=logits.device)
    met.scatter_(1, ids.masked_fill(places < padding[:, None], spare).clamp(max=spare), True)
    return torch.where(met[:, :spare], torch.where(logits < 0, logits * penalty, logits / penalty), logits)
