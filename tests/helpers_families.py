"""A tiny base of each family, and adapters for it that act."""

import torch
from helpers_adapters import factors_like
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from fedunlearn.models.adapter_tensors import read_tensors
from fedunlearn.models.lora_config import plain_config
from fedunlearn.records.adapter import Adapter

SMALL = {"vocab_size": 266, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=266, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2),
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "gpt2": {"target_modules": ["c_attn", "attn.c_proj", "c_fc"]},
    "qwen3_moe": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}
FAMILIES = sorted(CONFIGS)


def base_of(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The frozen base, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(CONFIGS[kind]).to(dtype).eval().requires_grad_(False)
    base.name_or_path = "base"
    return base


def adapter_of(kind: str, seed: int = 1, sidecar: tuple[int, ...] = (), size: float = 0.1, **lora: object) -> Adapter:
    """An adapter whose factors act; sidecar: ranks of what lies beside it."""
    targets = TARGETS.get(kind, {"target_modules": PROJECTIONS})
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **targets, **lora})
    config.base_model_name_or_path = "base"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base_of(kind), config)
    generator = torch.Generator().manual_seed(seed)
    own = {n: t + size * torch.randn(t.shape, generator=generator) for n, t in read_tensors(model).items()}
    own = {n: t.abs() if "magnitude" in n else t for n, t in own.items()}
    return Adapter(own, plain_config(config), "print", factors_like(own, sidecar, seed + 50) if sidecar else {})


def base_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all that is not an adapter's, by name."""
    return {
        n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n and "modules_to_save" not in n
    }
