"""Configs and values for the tests of models: a resident model in one call, adapters that act."""

import shutil
from pathlib import Path

import torch
from helpers_eval import LLAMA3_ARGS, tiny_llama
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fedunlearn.config.lora import LoraArgs
from fedunlearn.config.model import ModelArgs, ModelConfig
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.lora_config import lora_config_of
from fedunlearn.models.resident import Resident, resident
from fedunlearn.models.source import resolve_source
from fedunlearn.records.adapter import Adapter

NOWHERE = Path("no pocket is built here")
TAKE_ALL = {"r": None, "lora_alpha": None, "target_modules": None}
TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "c_proj", "c_fc")}
"""Targets of each tiny base: wide and narrow ones; those of GPT-2 hold their weights as [in, out]."""


def lora_args(**changed) -> LoraArgs:
    """r 4, alpha 8, two targets, and what differs."""
    return LoraArgs(**{"r": 4, "lora_alpha": 8.0, "target_modules": ("q_proj", "v_proj"), **changed})


def model_config(path: Path, lora: dict | None = None, **args) -> ModelConfig:
    """The `model` group for a folder, on the CPU. lora: what differs in lora_config."""
    named = {"pretrained_model_name_or_path": str(path), "device": "cpu", "lora_config": lora_args(**(lora or {}))}
    return ModelConfig(model_args=ModelArgs(**{**named, **args}), template_args=LLAMA3_ARGS)


def load(config: ModelConfig, seed: int = 0) -> Resident:
    """The process's model for that config."""
    source = resolve_source(config.model_args, NOWHERE)
    return resident(config, source, seed=seed, max_length=256, pocket_dir=NOWHERE)


def drawn(adapter: Adapter, seed: int = 1) -> Adapter:
    """The same adapter with random values, B included."""
    generator = torch.Generator().manual_seed(seed)
    return adapter.replace({k: 0.1 * torch.randn(t.shape, generator=generator) for k, t in adapter.tensors.items()})


def copy_of(folder: Path, place: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, place / "copy"))


def some_logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of two rows of six ids."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(12).reshape(2, 6) + 40).logits
    return logits


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Two layers, hidden 32, no dropout; its projections are Conv1D, whose weights stand the other way round."""
    config = GPT2Config(
        vocab_size=266,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=265,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def tiny_base(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A frozen `llama` or `gpt2`."""
    base = (tiny_llama() if kind == "llama" else tiny_gpt2()).to(dtype).eval().requires_grad_(False)
    base.name_or_path = "base"
    return base


def attached(kind: str, dtype: torch.dtype = torch.float32, **lora: object) -> PeftModel:
    """A tiny base with fresh LoRA layers."""
    config = lora_config_of(lora_args(**{"target_modules": TARGETS[kind], **lora}), None, "base")
    model = attach_lora(tiny_base(kind, dtype), config)
    draw_fresh(model, 0)
    return model
