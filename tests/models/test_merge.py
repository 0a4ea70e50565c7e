"""Merging: the logits stay, the base comes back bit by bit, and what a cast costs is told."""

import pytest
import torch
from helpers_adapters import apart
from helpers_families import FAMILIES, adapter_of, base_of, base_tensors
from helpers_models import some_logits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedunlearn.errors import UserError
from fedunlearn.models import merge as merging
from fedunlearn.models.merge import is_merged, merge, merged_base, unmerge
from fedunlearn.models.switch import put_adapter, switch_to

VARIANTS = [
    pytest.param(kind, {}, id=kind) for kind in FAMILIES
] + [
    pytest.param("llama", {"use_dora": True}, id="dora"),
    pytest.param("gpt2", {"use_dora": True}, id="dora on Conv1D"),
    pytest.param("llama", {"use_rslora": True}, id="rslora"),
    pytest.param("gpt2", {"lora_bias": True}, id="bias beside B"),
    pytest.param("qwen2", {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, id="bias beside B, Linear"),
    pytest.param("gpt2", {"bias": "lora_only"}, id="the base's biases"),
    pytest.param("llama", {"modules_to_save": ["lm_head"]}, id="a saved head"),
    pytest.param("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}}, id="patterns"),
    pytest.param("llama", {"sidecar": (3, 1, 5)}, id="side-car"),
    pytest.param("gpt2", {"sidecar": (3, 1, 5)}, id="side-car on Conv1D"),
    pytest.param("llama", {"sidecar": (2,), "use_dora": True}, id="side-car beside dora"),
]  # fmt: skip


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(("kind", "lora"), VARIANTS)
def test_merged_logits_stay_and_the_base_comes_back_bit_by_bit(kind, lora):
    bare = some_logits(base_of(kind))
    model = put_adapter(base_of(kind), adapter_of(kind, **lora))
    before, wanted = base_tensors(model), some_logits(model)
    assert apart(wanted, bare) > 0.05
    loss = merge(model)
    assert is_merged(model)
    assert not same(base_tensors(model), before)
    assert apart(some_logits(model), wanted) < 1e-5
    assert loss.error < 1e-5
    unmerge(model)
    assert not is_merged(model)
    assert same(base_tensors(model), before)
    assert torch.equal(some_logits(model), wanted)


@pytest.mark.parametrize(("kind", "lora"), VARIANTS)
def test_the_plain_model_gives_the_same_logits(kind, lora):
    model = put_adapter(base_of(kind), adapter_of(kind, **lora))
    wanted = some_logits(model)
    plain, _ = merged_base(model, torch.float32)
    assert not any(
        "lora_" in name or "base_layer" in name or "modules_to_save" in name for name, _ in plain.named_modules()
    )
    assert apart(some_logits(plain), wanted) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3_moe"])
def test_a_bfloat16_base_comes_back_too_and_keeps_its_dtype(kind):
    model = put_adapter(base_of(kind, torch.bfloat16), adapter_of(kind))
    before = base_tensors(model)
    assert merge(model, keep_on="cpu").error > 1e-4
    assert {t.dtype for t in base_tensors(model).values()} == {torch.bfloat16}
    unmerge(model)
    assert same(base_tensors(model), before)


def test_peft_s_own_way_back_is_another(monkeypatch):
    """Why what is overwritten is kept: subtracting leaves many entries changed."""
    model = put_adapter(base_of("llama"), adapter_of("llama"))
    before = base_tensors(model)
    model.merge_adapter()
    model.unmerge_adapter()
    changed = sum(int((t != before[n]).sum()) for n, t in base_tensors(model).items())
    assert changed > 0.1 * sum(t.numel() for n, t in before.items() if "proj" in n)


def test_several_adapters_at_once_are_merged_with_their_weights():
    model = put_adapter(base_of("llama"), adapter_of("llama", 1, sidecar=(2,)))
    put_adapter(model, adapter_of("llama", 2, sidecar=(3,)), "other")
    switch_to(model, {"default": 0.5, "other": -1.5})
    wanted, before = some_logits(model), base_tensors(model)
    merge(model)
    assert apart(some_logits(model), wanted) < 1e-5
    unmerge(model)
    assert same(base_tensors(model), before)


class TestCastLoss:
    def test_by_hand(self):
        """W = 1, s B A = 2^-9 in the first row, 3 in the second: near 1 bfloat16 has steps of 2^-7, so 1 + 2^-9 stays 1 and 1 + 3 = 4 is exact.

        wanted: two entries each; lost: the first row's two, so error = sqrt(2 * 2^-18) / sqrt(2 * 2^-18 + 2 * 9)."""
        base = base_of("llama")
        adapter = adapter_of("llama", target_modules=["q_proj"], r=1, lora_alpha=1, layers_to_transform=[0])
        b, a = torch.zeros(32, 1), torch.zeros(1, 32)
        b[0], b[1], a[0, :2] = 2.0**-9, 3.0, 1.0
        values = {n: a if "lora_A" in n else b for n in adapter.tensors}
        for layer in base.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data.fill_(1.0)
        loss = merged_base(put_adapter(base, adapter.replace(values)), torch.bfloat16)[1]
        assert (loss.still, loss.entries) == (2, 32 * 32)
        assert loss.error == pytest.approx((2 * 2.0**-18) ** 0.5 / (2 * 2.0**-18 + 18) ** 0.5, rel=1e-9)

    @pytest.mark.parametrize(("kind", "lora"), VARIANTS)
    def test_it_is_the_same_however_many_rows_are_summed_at_once(self, kind, lora, monkeypatch):
        found = []
        for entries in (2**20, 40):
            monkeypatch.setattr(merging, "ENTRIES", entries)
            found.append(merged_base(put_adapter(base_of(kind), adapter_of(kind, **lora)), torch.bfloat16))
        (whole, loss), (parts, other) = found
        assert other.error == pytest.approx(loss.error, rel=1e-6)
        assert (other.still, other.entries) == (loss.still, loss.entries)
        assert all(torch.allclose(p, q, rtol=0.01) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))

    def test_an_adapter_that_adds_nothing_loses_nothing(self):
        adapter = adapter_of("llama")
        zero = adapter.replace({n: torch.zeros_like(t) for n, t in adapter.tensors.items()})
        loss = merge(put_adapter(base_of("llama"), zero))
        assert (loss.error, loss.still) == (0.0, 0)


class TestRefused:
    def test_merging_twice_and_unmerging_what_is_not(self):
        model = put_adapter(base_of("llama"), adapter_of("llama"))
        with pytest.raises(UserError, match="is not merged"):
            unmerge(model)
        merge(model)
        with pytest.raises(UserError, match="merged already: unmerge it first"):
            merge(model)
        with pytest.raises(UserError, match="merged already"):
            merged_base(model, torch.float32)

    def test_what_peft_merged(self):
        model = put_adapter(base_of("llama"), adapter_of("llama"))
        model.merge_adapter()
        with pytest.raises(UserError, match="merged already"):
            merge(model)

    def test_a_quantised_weight(self):
        base = base_of("llama")
        model = put_adapter(base, adapter_of("llama"))
        layer = base.model.layers[0].self_attn.q_proj.base_layer
        layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
        before = base_tensors(model)
        with pytest.raises(
            UserError, match=r"layers.0.self_attn.q_proj.*not merged into a quantised base; load the base in bfloat16"
        ):
            merge(model)
        assert all(t.equal(before[n]) for n, t in base_tensors(model).items() if t.dtype == torch.float32)

    def test_a_result_that_is_not_finite_changes_nothing(self):
        adapter = adapter_of("llama")
        last = [n for n in adapter.tensors if n.endswith("lora_B.weight")][-1]
        values = {**adapter.tensors, last: torch.full_like(adapter.tensors[last], float("nan"))}
        model = put_adapter(base_of("llama"), adapter.replace(values))
        before = base_tensors(model)
        with pytest.raises(UserError, match=r"is not finite in torch\.float32: .*; nothing was changed$"):
            merge(model)
        assert same(base_tensors(model), before)
        assert not is_merged(model)
        with pytest.raises(UserError, match=r"is not finite in torch\.float32: .*too narrow for it$"):
            merged_base(model, torch.float32)

    def test_a_bias_where_the_base_has_none(self):
        model = put_adapter(base_of("llama"), adapter_of("llama", lora_bias=True))
        with pytest.raises(
            UserError, match=r"lora_bias=true, but Linear has no bias .*14 layers, first: .*q_proj"
        ) as caught:
            merge(model)
        assert len(caught.value.faults) == 1

    def test_a_head_tied_to_the_embedding(self):
        model = put_adapter(base_of("qwen2"), adapter_of("qwen2", target_modules=["lm_head"]))
        with pytest.raises(UserError, match="the embedding's too"):
            merge(model)


class _Widest(TorchDispatchMode):
    """Remembers how many entries the largest float64 tensor has that is made meanwhile."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            self.entries = max(self.entries, made.untyped_storage().nbytes() // made.itemsize)
        return made


@pytest.mark.parametrize(("kind", "lora"), VARIANTS)
def test_no_weight_is_held_in_float64_as_a_whole(kind, lora, monkeypatch):
    """The widest thing that is: a factor, or the rows of one round; an expert counts as one row."""
    monkeypatch.setattr(merging, "ENTRIES", 256)
    model = put_adapter(base_of(kind), adapter_of(kind, **lora))
    factors = max(t.numel() for n, t in model.named_parameters() if "lora_" in n)
    expert = max((t[0].numel() for n, t in model.named_parameters() if t.dim() == 3), default=0)
    with _Widest() as widest:
        merge(model)
    assert 0 < widest.entries <= max(256, factors, expert) < 32 * 96
