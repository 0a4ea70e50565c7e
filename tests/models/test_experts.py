"""Fused experts as pairs of their own, against what PEFT's own layer adds to each expert."""

import pytest
import safetensors.torch
import torch
from helpers_models import some_logits
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import load_adapter, save_adapter
from fedunlearn.models.adapter_tensors import live_parameters, live_tensors, read_tensors, write_tensors
from fedunlearn.models.experts import join_experts, split_experts
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.lora_config import plain_config
from fedunlearn.records.adapter import Adapter

SMALL = {"vocab_size": 266, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
CONFIGS = [
    Qwen3MoeConfig(**SMALL, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    MixtralConfig(**SMALL, num_local_experts=3),
]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "task_type": "CAUSAL_LM"}  # fmt: skip


def base_of(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def attached(config):
    lora = LoraConfig(**LORA)
    model = attach_lora(base_of(config), lora)
    generator = torch.Generator().manual_seed(1)
    write_tensors(model, {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in read_tensors(model).items()})
    return model, plain_config(lora)


@pytest.fixture(params=CONFIGS, ids=lambda config: config.model_type)
def made(request):
    return attached(request.param)


def test_each_expert_s_pair_is_what_is_added_to_its_weight(made):
    model, _ = made
    tensors, seen = read_tensors(model), 0
    for path, layer in model.named_modules():
        if not isinstance(layer, ParamWrapper):
            continue
        for e, added in enumerate(layer.get_delta_weight("default")):
            a, b = (tensors[f"{path}.{e}.lora_{factor}.weight"] for factor in "AB")
            assert (a.shape[0], b.shape[1]) == (2, 2)
            assert torch.allclose(2.0 * b @ a, added, rtol=0, atol=1e-6)
            seen += 1
    assert seen == sum(".experts." in name for name in tensors) / 2  # A and B


def test_views_share_memory_and_parameters_stay_whole(made):
    model, _ = made
    live, parameters = live_tensors(model), live_parameters(model)
    assert sum(t.numel() for t in live.values()) == sum(p.numel() for p in parameters.values())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    name = next(name for name in live if ".experts.1.lora_B" in name)
    with torch.no_grad():
        live[name].add_(1.0)
    changed = [n for n, p in parameters.items() if not torch.equal(p, before[n])]
    assert changed == [name.replace(".experts.1.", ".experts.")]
    assert int((parameters[changed[0]] != before[changed[0]]).sum()) == live[name].numel()


def test_apart_and_together_are_inverse(made):
    model, config = made
    tensors = read_tensors(model)
    fused = join_experts(tensors, config)
    assert sorted(fused) == sorted(live_parameters(model))
    assert all(torch.equal(fused[name], parameter) for name, parameter in live_parameters(model).items())
    again = split_experts(fused, config)
    assert list(again) == list(tensors)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_the_folder_is_peft_s_own(made, tmp_path):
    model, config = made
    adapter = Adapter(read_tensors(model), config, "print")
    save_adapter(tmp_path / "adapter", adapter)
    assert any(t.shape[0] > 4 for n, t in safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors").items() if "experts.lora_A" in n)  # fmt: skip
    assert load_adapter(tmp_path / "adapter")[0] == adapter
    theirs = PeftModel.from_pretrained(base_of(model.config), tmp_path / "adapter").eval()
    assert torch.equal(some_logits(theirs), some_logits(model))


def test_ranks_by_pattern_are_refused(made):
    model, config = made
    fused = join_experts(read_tensors(model), config)
    with pytest.raises(UserError, match=r"have ranks by pattern .*gate_up_proj"):
        split_experts(fused, {**config, "rank_pattern": {r".*\.gate_up_proj": 4}})
    with pytest.raises(UserError, match="which rank is whose"):
        split_experts(fused, {**config, "r": 5})
