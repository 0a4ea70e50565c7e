"""Casts of merged weights: the grids by hand, the merge against the adapter's own output, and what is left alone."""

import pytest
import torch
from helpers_adapters import apart
from helpers_eval import tiny_llama
from helpers_models import attached, some_logits
from peft import LoraConfig

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_tensors import ACTIVE, read_tensors, write_tensors
from fedunlearn.models.casts import NF4, bfloat16, cast_of, int8, merge_and_cast, nf4
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.sidecar import put_sidecar
from fedunlearn.records.adapter import MAGNITUDE, A, B

IDS = torch.tensor([[1, 5, 9, 200, 31, 7]])


def made(targets=("q_proj", "down_proj")):
    model = attach_lora(
        tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    )
    draw_fresh(model, 0)
    generator = torch.Generator().manual_seed(1)
    write_tensors(model, {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in read_tensors(model).items()})
    return model.eval()


def sidecar_of(model):
    generator = torch.Generator().manual_seed(2)
    return {
        n: 0.1 * torch.randn((3, t.shape[1]) if ".lora_A." in n else (t.shape[0], 3), generator=generator)
        for n, t in read_tensors(model).items()
        if n.endswith((A, B))
    }


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_int8_has_127_steps_of_the_row_s_largest():
    """Row (1, -.5, .003): step 1/127, .5 = 63.5 steps goes to 64 (half to even), .003 = .381 steps to 0."""
    found = int8(torch.tensor([[1.0, -0.5, 0.003], [0.0, 0.0, 0.0]]))
    assert torch.allclose(found, torch.tensor([[1.0, -64 / 127, 0.0], [0.0, 0.0, 0.0]]))


def test_nf4_takes_the_nearest_of_16_values_times_the_block_s_largest():
    weight = 3 * torch.linspace(-1, 1, 64)
    found = nf4(weight.view(8, 8)).view(-1)
    table = torch.tensor(NF4)
    nearest = table[(weight[:, None] / 3 - table).abs().argmin(1)] * 3
    assert torch.allclose(found, nearest)
    assert len(found.unique()) == 16


def test_nf4_blocks_go_over_rows_and_a_short_last_one_has_its_own_scale():
    """66 weights: 64 of size 1, then two of 1e-3, which a shared scale would have made 0."""
    weight = torch.cat([torch.ones(64), torch.full((2,), 1e-3)]).view(6, 11)
    assert torch.allclose(nf4(weight), weight)


def test_bfloat16_keeps_8_bits():
    assert bfloat16(torch.tensor([1.0 + 2**-7, 1.0 + 2**-9])).tolist() == [1.0 + 2**-7, 1.0]


@pytest.mark.parametrize("with_sidecar", [False, True])
def test_merged_without_a_cast_the_model_says_the_same(with_sidecar):
    model = made()
    if with_sidecar:
        put_sidecar(model, sidecar_of(model), ACTIVE)
    before, plain = logits(model), logits(tiny_llama().eval())
    assert (before - plain).abs().max() > 1e-2
    merge_and_cast(model, lambda weight: weight)
    assert torch.allclose(logits(model), before, atol=2e-5)
    assert all(not tensor.any() for tensor in read_tensors(model).values())


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {"use_dora": True}),
        ("gpt2", {"use_dora": True}),
        ("gpt2", {"bias": "all", "lora_bias": True}),
        ("llama", {"modules_to_save": ("lm_head", "o_proj")}),
        ("gpt2", {}),
    ],
)
def test_merged_without_a_cast_what_is_no_factor_still_acts(kind, lora):
    model = attached(kind, **lora)
    generator = torch.Generator().manual_seed(1)
    moved = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in read_tensors(model).items()}
    write_tensors(model, moved)
    if "use_dora" not in lora:
        put_sidecar(model, sidecar_of(model), ACTIVE)
    before = some_logits(model)
    merge_and_cast(model, lambda weight: weight)
    assert apart(some_logits(model), before) < 1e-5
    after = read_tensors(model)
    assert not any(t.any() for n, t in after.items() if n.endswith((A, B)))
    assert all(torch.equal(t, moved[n]) for n, t in after.items() if not n.endswith((A, B, MAGNITUDE)))


def test_every_linear_layer_but_the_head_is_cast():
    model = made()
    head = model.get_output_embeddings().weight.clone()
    merge_and_cast(model, nf4)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name and module is not model.get_output_embeddings():
            assert torch.allclose(nf4(module.weight.float()), module.weight.float(), atol=1e-6), name
    assert torch.equal(model.get_output_embeddings().weight, head)


def test_a_backend_that_is_not_there_is_refused_with_the_way_out():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(UserError, match=r"probe.backend=bitsandbytes: nf4 needs .*set it to simulated"):
        cast_of("nf4", "bitsandbytes")
    assert cast_of("bfloat16", "bitsandbytes") is bfloat16
