"""Attention masks that say of each position which others it sees, and which models take them."""

import inspect

import torch
from torch import nn

from fedunlearn.models.inner import inner_model

KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


def takes_block_mask(model: nn.Module, longest: int) -> bool:
    """Says whether the model may be given a [B, 1, T, T] mask with position ids of ours, for rows of up to `longest` tokens.

    It must be a transformer of transformers' attention interface (which hands such a mask on as it is), under sdpa or eager attention, with position_ids
    among its arguments, no state besides attention, and no layer that the mask would not reach (linear, chunked, convolutional). A sliding window
    is in order where no row reaches it: the mask given takes the window's place.
    """
    inner = inner_model(model)
    config = getattr(inner, "config", None)
    if (
        config is None
        or not getattr(inner, "_supports_attention_backend", False)
        or getattr(inner, "_is_stateful", True)
    ):
        return False
    config = inner.config.get_text_config()
    if config._attn_implementation not in ("sdpa", "eager") or not getattr(config, "is_causal", True):
        return False
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return False
    windows = (getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None))
    layers = set(getattr(config, "layer_types", None) or ())
    return layers <= KNOWN_LAYERS and all(window is None or longest <= window for window in windows)


def breadth_of(model: nn.Module) -> float:
    """Estimates at how many positions attention over a sequence costs as much as the linear layers do: both grow with depth, the first with width, the second with its square.

    Counted in multiplications: a position takes one a parameter in the linear layers, and 2 * hidden for each position of the sequence in a layer's attention.
    """
    inner = inner_model(model)
    config = inner.config.get_text_config()
    tables = {id(m.weight) for m in (inner.get_input_embeddings(), inner.get_output_embeddings())}
    linear: int = sum(p.numel() for p in inner.parameters() if id(p) not in tables)
    attention: int = 2 * config.hidden_size * config.num_hidden_layers
    return linear / attention


def as_given(model: nn.Module, seen: torch.Tensor) -> torch.Tensor:
    """Gives a mask [B, 1, T, T] from seen [B, T, T] bool in the kind the model's attention adds up: bool under sdpa, 0 and the dtype's lowest number under eager."""
    inner = inner_model(model)
    mask = seen[:, None]
    if inner.config._attn_implementation == "sdpa":
        return mask
    zero = torch.zeros((), dtype=inner.dtype, device=seen.device)
    return torch.where(mask, zero, torch.finfo(inner.dtype).min)
