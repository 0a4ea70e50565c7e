"""One tiny config an architecture: two layers, hidden 32, no weights of anybody's."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "mistral": MistralConfig(**SMALL),
    "gemma": GemmaConfig(**SMALL),
    "gemma2": Gemma2Config(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL),
    "phi3": Phi3Config(**SMALL),
    "phi": PhiConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3),
}
MOE = ("qwen3_moe", "mixtral")
TIED = ("gemma", "gemma2", "gemma3", "gpt2")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_SELF = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_SWIGLU = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ATTENTION = {
    **dict.fromkeys(CONFIGS, _SELF),
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj"),
    "phi": (*_SELF[:3], "self_attn.dense"),
    "gpt2": ("attn.c_attn", "attn.c_proj"),
}
MLP = {
    **dict.fromkeys(CONFIGS, _SWIGLU),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj"),
    "phi": ("mlp.fc1", "mlp.fc2"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    **dict.fromkeys(MOE, EXPERTS),
}
"""What has factors in each layer, by its name in there."""


def full(kind: str, names: tuple[str, ...], layers: tuple[int, ...] = (0, 1)) -> set[str]:
    """The names in both layers."""
    stack = "transformer.h" if kind == "gpt2" else "model.layers"
    return {f"{stack}.{layer}.{name}" for layer in layers for name in names}


def tiny(kind: str) -> PreTrainedModel:
    """A frozen model with random weights, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    model.name_or_path = "base"
    return model.requires_grad_(False).eval()
