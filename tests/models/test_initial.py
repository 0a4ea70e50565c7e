"""What fresh adapters begin with: as PEFT has it, saying what the base says, and with no entry of the base changed."""

import gc
import math
import weakref

import pytest
import torch
from helpers_adapters import apart, factors_like
from helpers_models import TARGETS, attached, load, lora_args, model_config, some_logits, tiny_base
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from fedunlearn.aggregation.factors import modules_of
from fedunlearn.errors import UserError
from fedunlearn.models import initial
from fedunlearn.models.adapter_files import load_adapter, save_adapter
from fedunlearn.models.adapter_tensors import ACTIVE, live_tensors, read_tensors, write_tensors
from fedunlearn.models.export import export
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.lora_config import lora_config_of
from fedunlearn.models.resident import release, take_probe
from fedunlearn.models.sidecar import put_sidecar
from fedunlearn.records.adapter import A, Adapter, B

KINDS = sorted(TARGETS)
OF_BASE = ("pissa", "pissa_niter_8", "olora")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def fresh(kind, how, seed=0, **lora):
    """A model that began so, its side-car in place; its factors and its side-car."""
    model = attached(kind, **lora)
    sidecar = draw_fresh(model, seed, how)
    put_sidecar(model, sidecar, ACTIVE)
    return model, read_tensors(model), sidecar


def by_peft(kind, how, seed=0, **lora):
    """PEFT's own factors of the same base, which it changes."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS[kind]), init_lora_weights=how, **lora)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(tiny_base(kind), config).eval()


class TestOfTheBase:
    @pytest.mark.parametrize("how", OF_BASE)
    def test_the_model_says_what_the_base_says(self, kind, how):
        model, tensors, _ = fresh(kind, how)
        assert all(tensor.any() for tensor in tensors.values())
        assert apart(some_logits(model), some_logits(tiny_base(kind))) < 1e-5

    @pytest.mark.parametrize("how", OF_BASE)
    def test_no_tensor_of_the_base_is_changed(self, kind, how):
        model, _, _ = fresh(kind, how)
        base = tiny_base(kind).state_dict()
        held = {name.replace(".base_layer", ""): t for name, t in model.get_base_model().state_dict().items()}
        assert all(torch.equal(held[name], tensor) for name, tensor in base.items())

    @pytest.mark.parametrize("rslora", [False, True])
    def test_pissa_s_factors_are_peft_s_up_to_a_sign(self, kind, rslora):
        _, tensors, _ = fresh(kind, "pissa", use_rslora=rslora)
        theirs = get_peft_model_state_dict(by_peft(kind, "pissa", use_rslora=rslora))
        for module in modules_of(tensors):
            a, b = theirs[module.a], theirs[module.b]
            sign = torch.sign((tensors[module.a] * a).sum(1))
            assert torch.allclose(tensors[module.a], a * sign[:, None], atol=1e-5)
            assert torch.allclose(tensors[module.b], b * sign, atol=1e-5)

    def test_olora_s_factors_are_peft_s(self):
        _, tensors, _ = fresh("llama", "olora")  # PEFT takes Conv1D's weights as they stand, the wrong way round
        theirs = get_peft_model_state_dict(by_peft("llama", "olora"))
        assert all(torch.allclose(tensor, theirs[name], atol=1e-5) for name, tensor in tensors.items())

    def test_many_iterations_of_the_random_svd_come_near_the_best_rank(self, kind):
        """What pissa leaves of each weight, to a hundredth."""
        model, exact, _ = fresh(kind, "pissa")
        _, found, _ = fresh(kind, "pissa_niter_16")
        layers = dict(model.named_modules())
        for module in modules_of(exact):
            layer = layers[module.a.removesuffix(A)]
            weight = layer.base_layer.weight.T if layer.fan_in_fan_out else layer.base_layer.weight
            left = [float((weight - 2 * t[module.b] @ t[module.a]).norm()) for t in (found, exact)]
            assert left[1] <= left[0] * (1 + 1e-6) < left[1] * 1.01
            assert left[1] < 0.9 * float(weight.norm())

    def test_it_is_a_function_of_the_seed_and_leaves_random_state(self, kind):
        state = torch.get_rng_state()
        _, first, _ = fresh(kind, "pissa_niter_1", seed=3)
        _, again, _ = fresh(kind, "pissa_niter_1", seed=3)
        _, other, _ = fresh(kind, "pissa_niter_1", seed=4)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    @pytest.mark.parametrize("how", ["pissa", "olora"])
    def test_it_is_found_once_a_model_where_no_seed_matters(self, how, monkeypatch):
        model, tensors, _ = fresh("llama", how)
        monkeypatch.setattr(initial, "_factors", None)
        write_tensors(model, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
        for seed in (0, 7):
            draw_fresh(model, seed, how)
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_tensors(model).items())

    def test_of_many_seeds_the_last_one_s_is_kept(self, monkeypatch):
        model = attached("llama")
        kept = [weakref.ref(tensor) for tensor in draw_fresh(model, 1, "pissa_niter_1").values()]
        assert all(ref() is not None for ref in kept)
        draw_fresh(model, 2, "pissa_niter_1")
        wanted = read_tensors(model)
        gc.collect()
        assert not any(ref() is not None for ref in kept)
        monkeypatch.setattr(initial, "_factors", None)
        draw_fresh(model, 2, "pissa_niter_1")
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in read_tensors(model).items())

    def test_the_stack_is_the_difference_to_the_base_at_twice_the_rank_and_loads_in_peft(self, kind, tmp_path):
        from peft import PeftModel

        model, tensors, sidecar = fresh(kind, "pissa")
        generator = torch.Generator().manual_seed(1)
        moved = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}
        write_tensors(model, moved)
        config = {
            **model.peft_config[ACTIVE].to_dict(),
            "target_modules": list(TARGETS[kind]),
            "task_type": "CAUSAL_LM",
        }
        config = {key: getattr(value, "value", value) for key, value in config.items() if key != "runtime_config"}
        stack, _ = export(Adapter(moved, config, None, sidecar), "exact")
        assert {t.shape[0] for name, t in stack.tensors.items() if name.endswith(A)} == {8}
        save_adapter(tmp_path / "a", stack)
        theirs = PeftModel.from_pretrained(tiny_base(kind), tmp_path / "a").eval()
        assert apart(some_logits(theirs), some_logits(model)) < 1e-5
        assert apart(some_logits(model), some_logits(tiny_base(kind))) > 1e-3

    def test_a_rank_that_no_module_has_is_refused(self):
        with pytest.raises(
            UserError,
            match=r"init_lora_weights=pissa with rank 40 of module '.*', whose sides are 32 and 64: its weight has 32 directions at most",
        ):
            fresh("llama", "pissa", r=40)


class TestDrawn:
    def test_gaussian_has_the_deviation_one_over_r_and_b_zero(self):
        _, tensors, _ = fresh("llama", "gaussian", target_modules="all-linear")
        values = torch.cat([t.flatten() for name, t in tensors.items() if name.endswith(A)])
        assert float(values.std()) == pytest.approx(1 / 4, rel=0.05)
        assert float(values.mean()) == pytest.approx(0.0, abs=0.02)
        assert not any(t.any() for name, t in tensors.items() if name.endswith(B))

    def test_orthogonal_moves_both_factors_and_no_logit(self, kind):
        """A's rows and B's columns lie in halves of one orthogonal matrix: B A = 0, as in PEFT, whose entries have the same size."""
        model, tensors, sidecar = fresh(kind, "orthogonal")
        theirs = get_peft_model_state_dict(by_peft(kind, "orthogonal"))
        assert not sidecar
        for module in modules_of(tensors):
            assert tensors[module.b].any()
            assert (tensors[module.b] @ tensors[module.a]).abs().max() < 1e-7
            assert float(tensors[module.a].std()) == pytest.approx(float(theirs[module.a].std()), rel=0.5)
        assert apart(some_logits(model), some_logits(tiny_base(kind))) < 1e-5

    def test_orthogonal_wants_an_even_rank(self):
        with pytest.raises(
            UserError,
            match=r"init_lora_weights=orthogonal with rank 3 of module '.*'; choose an even r|: it gives one half.*choose an even r",
        ):
            fresh("llama", "orthogonal", r=3)

    def test_rslora_with_matching_alpha_is_plain_lora(self, kind):
        """alpha / sqrt(r) with alpha 4 is 2, as 8 / 4 is."""
        plain, rslora = attached(kind), attached(kind, use_rslora=True, lora_alpha=4.0)
        moved = {name: t + 0.1 for name, t in read_tensors(plain).items()}
        for model in (plain, rslora):
            write_tensors(model, moved)
        assert apart(some_logits(rslora), some_logits(plain)) < 1e-6


class TestDora:
    def test_at_start_it_is_the_base_and_plain_lora(self, kind):
        model, tensors, _ = fresh(kind, True, use_dora=True)
        plain, drawn, _ = fresh(kind, True)
        assert all(torch.equal(tensors[name], t) for name, t in drawn.items())
        assert apart(some_logits(model), some_logits(plain)) < 1e-6
        assert apart(some_logits(model), some_logits(tiny_base(kind))) < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_magnitudes_are_peft_s_but_for_the_rounding_of_a_bfloat16_base(self, kind, dtype):
        model = attached(kind, dtype, use_dora=True)
        theirs = get_peft_model(
            tiny_base(kind, dtype), LoraConfig(r=4, use_dora=True, target_modules=list(TARGETS[kind]))
        )
        wanted = {name: t for name, t in get_peft_model_state_dict(theirs).items() if "magnitude" in name}
        found = read_tensors(model)
        assert len(wanted) == len(found) // 3
        for name, tensor in wanted.items():
            assert found[name].dtype == torch.float32
            assert torch.allclose(found[name], tensor.float(), rtol=1e-6 if dtype == torch.float32 else 2**-7)
        assert apart(some_logits(model).float(), some_logits(tiny_base(kind, dtype)).float()) < 1e-6

    def test_drawn_anew_they_are_the_base_s_again(self, kind):
        model, first, _ = fresh(kind, True, use_dora=True)
        write_tensors(model, {name: t + 1 for name, t in first.items()})
        draw_fresh(model, 0)
        assert all(torch.equal(tensor, first[name]) for name, tensor in read_tensors(model).items())


class TestResident:
    def test_what_is_saved_says_nothing_that_would_change_the_base(self, base_folder):
        made = load(model_config(base_folder, {"init_lora_weights": "pissa"}))
        assert made.start.peft_config["init_lora_weights"] is True
        assert made.start.sidecar.keys() == made.start.tensors.keys()
        release()

    def test_a_client_computes_nothing_of_the_base(self, base_folder, monkeypatch):
        """What it begins with is sent."""
        from fedunlearn.models.resident import resident
        from fedunlearn.models.source import resolve_source

        monkeypatch.setattr(initial, "_factors", None)
        config = model_config(base_folder, {"init_lora_weights": "olora"})
        source = resolve_source(config.model_args, base_folder)
        made = resident(config, source, seed=0, max_length=64, pocket_dir=base_folder, sent=True)
        assert not made.start.sidecar
        assert not any(t.any() for name, t in made.start.tensors.items() if name.endswith(B))
        release()

    def test_a_stack_brings_its_plain_tensors_along(self, base_folder, tmp_path):
        """LoRA's own biases act times s = 2; in the stack, whose s is 1, they hold it, and fresh factors above it have s = 2 again."""
        made = load(model_config(base_folder, {"lora_bias": True, "modules_to_save": ("lm_head",)}))
        generator = torch.Generator().manual_seed(3)
        moved = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in made.start.tensors.items()}
        whole = made.start.replace(moved, factors_like(moved, (3, 5)))
        made.put(whole)
        before = some_logits(made.model)
        stack, stacked = export(whole, "exact")
        save_adapter(tmp_path / "a", stack, take_probe(made), stacked)
        release()
        null = {"r": None, "lora_alpha": None, "target_modules": None}
        again = load(model_config(tmp_path / "a", null))
        assert apart(some_logits(again.model), before) < 1e-5
        bias = next(name for name in moved if name.endswith("lora_B.bias"))
        assert torch.allclose(again.start.tensors[bias], moved[bias])
        assert torch.allclose(load_adapter(tmp_path / "a")[0].tensors[bias], 2 * moved[bias])
        assert not any(t.any() for name, t in again.start.tensors.items() if name.endswith(B))
        release()


def test_a_base_in_bfloat16_has_float32_factors_near_it():
    config = lora_config_of(lora_args(), None, "base")
    model = attach_lora(tiny_base("llama", torch.bfloat16), config)
    sidecar = draw_fresh(model, 0, "pissa")
    put_sidecar(model, sidecar, ACTIVE)
    assert all(t.dtype == torch.float32 for t in live_tensors(model).values())
    assert apart(some_logits(model).float(), some_logits(tiny_base("llama", torch.bfloat16)).float()) < 0.05
    assert math.isfinite(float(some_logits(model).float().sum()))
