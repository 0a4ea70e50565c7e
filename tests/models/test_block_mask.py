"""Which models may be given a mask of ours, each answer with its reason, and what the mask is under each attention."""

import pytest
import torch
from helpers_eval import tiny_llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    Qwen2Config,
    Qwen3NextConfig,
)

from fedunlearn.models.block_mask import as_given, breadth_of, takes_block_mask

TINY = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def made(config, **kwargs):
    with torch.random.fork_rng():
        return AutoModelForCausalLM.from_config(config, **kwargs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_of_full_attention_take_it(attention):
    assert takes_block_mask(made(LlamaConfig(**TINY), attn_implementation=attention), 10**6)


def test_a_window_is_in_order_up_to_its_size():
    model = made(MistralConfig(**TINY, num_key_value_heads=1, sliding_window=8))
    assert takes_block_mask(model, 8)
    assert not takes_block_mask(model, 9)
    assert takes_block_mask(made(Qwen2Config(**TINY, num_key_value_heads=1, use_sliding_window=False)), 10**6)


def test_state_alibi_linear_layers_other_attention_and_strangers_do_not():
    assert not takes_block_mask(made(Mamba2Config(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=1)), 4)  # fmt: skip
    assert not takes_block_mask(made(BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2)), 4)
    assert not takes_block_mask(nn.Linear(2, 2), 4)
    linear = tiny_llama()
    linear.config.layer_types = ["full_attention", "linear_attention"]
    assert not takes_block_mask(linear, 4)
    flash = tiny_llama()
    flash.config._attn_implementation_internal = "flash_attention_2"
    assert not takes_block_mask(flash, 4)
    assert "linear_attention" in Qwen3NextConfig().layer_types


def test_an_adapter_hides_nothing_of_its_base():
    from peft import LoraConfig, get_peft_model

    model = tiny_llama()
    breadth = breadth_of(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert takes_block_mask(adapted, 4)
    assert breadth <= breadth_of(adapted) < 1.2 * breadth


def test_breadth_by_hand():
    """tiny_llama, a layer: 32 (32 + 16 + 16 + 32) + 3 * 32 * 64 + 2 norms of 32 = 9280, and a last norm of 32; 2 * 32 a position seen."""
    assert breadth_of(tiny_llama()) == pytest.approx((2 * 9280 + 32) / (2 * 64))


def test_the_mask_is_bool_under_sdpa_and_added_under_eager():
    seen = torch.tensor([[[True, False], [True, True]]])
    model = tiny_llama()
    assert torch.equal(as_given(model, seen), seen[:, None])
    model.set_attn_implementation("eager")
    lowest = torch.finfo(torch.float32).min
    assert as_given(model, seen).tolist() == [[[[0.0, lowest], [0.0, 0.0]]]]
