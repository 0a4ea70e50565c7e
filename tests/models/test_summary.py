"""Parameter counts on meta tensors, against the figures that are published for these models."""

import pytest
import torch
from helpers_families import CONFIGS, FAMILIES, TARGETS, adapter_of, base_of
from transformers import GPT2Config, LlamaConfig

from fedunlearn.config.lora import LoraArgs
from fedunlearn.errors import UserError
from fedunlearn.models.skeleton import skeleton
from fedunlearn.models.summary import (
    by_kind,
    read_config,
    summarise_adapter,
    summarise_base,
    summarise_fresh,
)

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8, "dtype": "bfloat16"}
GPT2 = GPT2Config()
LLAMA_1B = LlamaConfig(**LLAMA3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64, tie_word_embeddings=True)  # fmt: skip
LLAMA_3B = LlamaConfig(**LLAMA3, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128, tie_word_embeddings=True)  # fmt: skip
LLAMA_8B = LlamaConfig(**LLAMA3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False)  # fmt: skip
"""Dimensions as they stand in the models' own config.json."""


def lora(r, *targets, **more):
    return LoraArgs(r=r, lora_alpha=2.0 * r, target_modules=targets, **more)


@pytest.mark.parametrize(
    ("config", "args", "trainable", "total"),
    [
        pytest.param(GPT2, lora(8, "c_attn"), 294_912, 124_439_808, id="gpt2 c_attn"),
        pytest.param(GPT2, lora(8, "c_attn", "attn.c_proj"), 442_368, 124_439_808, id="gpt2 attention"),
        pytest.param(GPT2, lora(8, "c_attn", "c_proj"), 811_008, 124_439_808, id="gpt2 both c_proj"),
        pytest.param(LLAMA_1B, lora(32, *SEVEN), 22_544_384, 1_235_814_400, id="1B r 32"),
        pytest.param(LLAMA_1B, lora(16, *SEVEN), 11_272_192, 1_235_814_400, id="1B r 16"),
        pytest.param(LLAMA_3B, lora(32, *SEVEN), 48_627_712, 3_212_749_824, id="3B r 32"),
        pytest.param(LLAMA_8B, lora(32, *SEVEN), 83_886_080, 8_030_261_248, id="8B r 32"),
    ],
)
def test_the_published_counts(config, args, trainable, total):
    found = summarise_fresh(skeleton(config), args, "base")
    assert (found.trainable, found.total, found.frozen) == (trainable, total, total)
    assert sum(one.parameters for one in found.modules) == trainable
    assert found.adapter_bytes == 4 * trainable
    assert found.base_bytes == total * (2 if config is not GPT2 else 4)
    kinds = by_kind(found.modules)
    assert sum(one.parameters * one.count for one in kinds) == trainable
    assert {one.count for one in kinds} == {config.num_hidden_layers}


def test_one_module_by_hand():
    """q_proj of the 1B: r (2048 + 2048) = 32 * 4096 = 131,072; k_proj: 32 * (2048 + 512) = 81,920."""
    kinds = {one.name: one for one in by_kind(summarise_fresh(skeleton(LLAMA_1B), lora(32, *SEVEN), "base").modules)}
    q, k = (kinds[f"model.layers.*.self_attn.{name}_proj"] for name in "qk")
    assert (q.parameters, q.shape, q.rank, q.scale, q.count) == (131_072, (2048, 2048), 32, 2.0, 16)
    assert (k.parameters, k.shape) == (81_920, (512, 2048))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_base_by_itself_counts_what_the_real_one_has(kind):
    real = base_of(kind)
    found = summarise_base(skeleton(CONFIGS[kind]), kind)
    assert found.total == found.frozen == sum(p.numel() for p in real.parameters())
    assert sum(one.parameters for one in found.modules) == found.total
    assert (found.trainable, found.adapter_bytes) == (0, 0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_adapter_s_own_tensors_are_those_a_run_would_train(kind):
    targets = TARGETS.get(kind, {"target_modules": SEVEN})
    args = LoraArgs(r=4, lora_alpha=8.0, **{key: tuple(value) for key, value in targets.items()})
    from_config = summarise_fresh(skeleton(CONFIGS[kind]), args, kind)
    from_tensors = summarise_adapter(adapter_of(kind), skeleton(CONFIGS[kind]), kind)
    assert from_config == from_tensors


def test_what_is_trained_beside_factors():
    """A saved head is trained as a copy, 32 x 266 entries; a trained bias of the base is one that is not frozen: qkv has 96 in each of two layers."""
    head = summarise_fresh(skeleton(CONFIGS["llama"]), lora(4, "q_proj", modules_to_save=("lm_head",)), "base")
    assert head.trainable == 2 * 4 * (32 + 32) + 32 * 266
    assert head.frozen == head.total
    biased = adapter_of("gpt2", target_modules=["c_attn"], bias="lora_only")
    bias = summarise_adapter(biased, skeleton(CONFIGS["gpt2"]), "base")
    assert bias.trainable == 2 * 4 * (32 + 96) + 2 * 96
    assert bias.frozen == bias.total - 2 * 96


def test_nothing_is_allocated():
    base = skeleton(LLAMA_8B)
    summarise_fresh(base, lora(32, *SEVEN), "base")
    assert {p.device for p in base.parameters()} == {torch.device("meta")}


class TestRefused:
    def test_a_target_that_matches_nothing(self):
        with pytest.raises(UserError, match="'q_porj' matches no module"):
            summarise_fresh(skeleton(CONFIGS["llama"]), lora(4, "q_porj"), "base")

    def test_an_adapter_of_another_architecture(self):
        with pytest.raises(UserError, match=r"module 'transformer.h.0.attn.c_attn' is none of 'base'"):
            summarise_adapter(adapter_of("gpt2"), skeleton(CONFIGS["llama"]), "base")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "nonesuch"}', None])
    def test_what_is_no_config(self, tmp_path, text):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config.json' is no config.json of a model") as caught:
            read_config(tmp_path)
        assert len(caught.value.faults[0]) < 400

    def test_no_language_model(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        with pytest.raises(UserError, match=r"type .clip.: no causal language model"):
            skeleton(read_config(tmp_path / "config.json"))
