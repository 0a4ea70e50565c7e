"""AdaLoRA in the model: PEFT's own layers say the same, every key of its config arrives or is refused, and the folded adapter is plain LoRA."""

from dataclasses import fields, replace

import pytest
import torch
from helpers_architectures import CONFIGS, tiny
from helpers_models import drawn, lora_args, some_logits
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import SVDLinear

from fedunlearn import lora
from fedunlearn.aggregation.adalora import AdaLora, triplets_of
from fedunlearn.config.lora import OF_ADALORA, REFUSED, LoraArgs
from fedunlearn.config.model import ModelArgs
from fedunlearn.config.reading import Reader
from fedunlearn.errors import UserError
from fedunlearn.models.adalora import folded
from fedunlearn.models.adapter_files import load_adapter, save_adapter
from fedunlearn.models.adapter_tensors import ACTIVE, read_tensors, write_tensors
from fedunlearn.models.export import export
from fedunlearn.models.initial import draw_fresh
from fedunlearn.models.lora import REFERENCE, attach_lora, check_trainable, hold_reference, reference_active
from fedunlearn.models.lora_config import lora_config_of, plain_config
from fedunlearn.models.skeleton import skeleton
from fedunlearn.models.summary import summarise_fresh
from fedunlearn.records.adapter import Adapter, Weights

AT = "model.model_args.lora_config"
ADA = {"r": None, "peft_type": "ADALORA", "init_r": 4, "target_r": 2, "lora_alpha": 6.0}
TARGETS = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_fc"), "phi": ("q_proj", "fc1")}


def made(kind="llama", dtype=torch.float32, **changed):
    """Attached as a run does it."""
    args = lora_args(**{"target_modules": TARGETS.get(kind), **ADA, **changed})
    base = tiny(kind).to(dtype)
    return attach_lora(base, lora_config_of(args, None, "base", skeleton(CONFIGS[kind])))


def adapter_of(model):
    return Adapter(read_tensors(model), plain_config(model.peft_config[ACTIVE]), "print")


def acting(model, seed=1, without=()):
    """Every tensor of its adapter random; ranks in `without`, as (module's place, rank), masked."""
    start = drawn(adapter_of(model), seed)
    tensors = {name: 3 * tensor for name, tensor in start.tensors.items()}
    modules = triplets_of(tensors)
    for place, rank in without:
        tensors[modules[place].e][rank] = 0
    adapter = start.replace(tensors)
    write_tensors(model, adapter.tensors)
    return adapter


class TestTheModel:
    @pytest.mark.parametrize("kind", TARGETS)
    def test_it_is_peft_s_with_the_same_numbers(self, kind):
        model = made(kind)
        adapter = acting(model)
        config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6.0, total_step=5, target_modules=list(TARGETS[kind]), fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM")  # fmt: skip
        theirs = get_peft_model(tiny(kind), config).eval()
        own = {f"{name}.{ACTIVE}": tensor for name, tensor in adapter.tensors.items()}
        assert not theirs.load_state_dict(own, strict=False).unexpected_keys
        assert torch.equal(some_logits(theirs), some_logits(model))
        assert not torch.allclose(some_logits(theirs), some_logits(tiny(kind).eval()), atol=1e-2)

    def test_all_ranks_travel_under_peft_s_names(self):
        shapes = {name.rpartition(".")[2]: tuple(t.shape) for name, t in adapter_of(made()).tensors.items() if "q_proj" in name}  # fmt: skip
        assert shapes == {"lora_A": (4, 32), "lora_E": (4, 1), "lora_B": (32, 4)}

    def test_a_masked_rank_travels_too(self):
        model = made()
        acting(model, without=((0, 0), (1, 3)))
        assert {tuple(t.shape) for name, t in read_tensors(model).items() if name.endswith(".lora_E")} == {(4, 1)}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_fresh_it_says_what_the_base_says_and_its_factors_are_peft_s(self, dtype):
        """A and B normal with deviation .02 (over 4 x 32 and more entries: within a quarter), E zero; by the seed alone."""
        model = made(dtype=dtype)
        base = some_logits(tiny("llama").to(dtype).eval())
        draw_fresh(model, 5)
        first = read_tensors(model)
        assert torch.equal(some_logits(model), base)
        assert {t.dtype for t in first.values()} == {torch.float32}
        for module in triplets_of(first):
            assert not first[module.e].any()
            assert all(0.015 < float(first[name].std()) < 0.025 for name in (module.a, module.b))
        torch.manual_seed(99)
        draw_fresh(model, 5)
        assert all(torch.equal(first[name], t) for name, t in read_tensors(model).items())
        draw_fresh(model, 6)
        assert not all(torch.equal(first[name], t) for name, t in read_tensors(model).items())

    def test_a_frozen_reference_beside_it(self):
        model = made(dtype=torch.bfloat16)
        own = acting(model, 1)
        other = drawn(own, 2)
        hold_reference(model, Weights(other.tensors))
        check_trainable(model)
        mine = some_logits(model)
        with reference_active(model):
            theirs = some_logits(model)
        check_trainable(model)
        assert torch.equal(some_logits(model), mine)
        write_tensors(model, other.tensors)
        assert torch.equal(some_logits(model), theirs)
        assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(REFERENCE))

    def test_biases_and_saved_modules_stand_beside_it(self):
        model = made("phi", bias="lora_only", modules_to_save=("lm_head",))
        names = [n for n in read_tensors(model) if ".lora_" not in n]
        assert len([n for n in names if n.endswith("base_layer.bias")]) == 4
        assert len([n for n in names if "lm_head" in n]) == 2

    def test_its_parameters_are_counted(self):
        """Two layers of q_proj (32 x 32) and down_proj (48 -> 32): 4 (64 + 1) + 4 (80 + 1) = 584 a layer."""
        found = summarise_fresh(
            skeleton(CONFIGS["llama"]), lora_args(**{**ADA, "target_modules": TARGETS["llama"]}), "x"
        )
        assert found.trainable == 2 * 584


def by_peft(kind, folder):
    return some_logits(PeftModel.from_pretrained(tiny(kind), folder).eval())


class TestFolded:
    WITHOUT = ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3), (3, 1))

    @pytest.mark.parametrize("kind", TARGETS)
    def test_plain_peft_says_the_same(self, kind, tmp_path):
        """Ranks 2, none, 4 and 3 are left; the module without keeps one of zeros."""
        model = made(kind)
        adapter = acting(model, without=self.WITHOUT)
        wanted = some_logits(model)
        plain, stacked = export(adapter, "exact")
        assert stacked is None
        ranks = [len(t) for name, t in plain.tensors.items() if name.endswith(".lora_A.weight")]
        assert ranks == [2, 1, 4, 3]
        save_adapter(tmp_path / "a", plain)
        assert load_adapter(tmp_path / "a")[0] == plain
        found = by_peft(kind, tmp_path / "a")
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-6
        assert float((found - some_logits(tiny(kind).eval())).abs().max()) > 1e-2

    def test_its_config_is_lora_s_and_the_scale_is_the_same_everywhere(self):
        """6 / (4 + 1e-5) in float32, whatever a module's rank."""
        model = made()
        plain = folded(acting(model, without=self.WITHOUT))
        config = plain.peft_config
        assert set(config) == set(LoraConfig().to_dict())
        assert (config["peft_type"], config["r"]) == ("LORA", 4)
        assert sorted(config["rank_pattern"].values()) == [1, 2, 3]
        scales = {
            config["lora_alpha"] / 4,
            *(a / config["rank_pattern"][n] for n, a in config["alpha_pattern"].items()),
        }
        assert all(scale == pytest.approx(6 / 4.00001, rel=1e-6) for scale in scales)

    def test_a_module_whose_every_rank_is_masked_can_learn_again(self):
        model = made()
        plain = folded(acting(model, without=self.WITHOUT))
        (a, b), *_ = [
            (t, plain.tensors[name.replace("lora_A", "lora_B")])
            for name, t in plain.tensors.items()
            if name.endswith(".lora_A.weight") and len(t) == 1
        ]
        assert a.any()
        assert not b.any()

    def test_the_next_stage_loads_it_merges_it_and_begins_from_it(self, tmp_path):
        model = made()
        plain = folded(acting(model, without=self.WITHOUT))
        wanted = some_logits(model)
        args = lora_args(r=None, lora_alpha=None, target_modules=None)
        next_one = attach_lora(tiny("llama"), lora_config_of(args, plain, "base", skeleton(CONFIGS["llama"])))
        write_tensors(next_one, plain.tensors)
        assert float((some_logits(next_one) - wanted).abs().max() / wanted.abs().max()) < 1e-6
        alone = lora.apply(tiny("llama"), replace(plain, base_fingerprint=None), trust_base=True)
        lora.merge(alone)
        assert float((some_logits(alone) - wanted).abs().max() / wanted.abs().max()) < 1e-5

    def test_biases_and_saved_modules_stay_as_they_are(self):
        model = made("phi", bias="lora_only", modules_to_save=("lm_head",))
        adapter = acting(model)
        plain = folded(adapter)
        kept = [name for name in adapter.tensors if ".lora_" not in name]
        assert all(torch.equal(plain.tensors[name], adapter.tensors[name]) for name in kept)
        assert len(plain.tensors) == len(kept) + 2 * 4

    def test_plain_lora_comes_back_as_it_is(self):
        adapter = drawn(adapter_of(attach_lora(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))))
        assert folded(adapter) is adapter


SEEN = {
    "init_r": (8, lambda m: {layer.r["default"] for layer in layers(m)} == {8}),
    "target_r": (3, lambda m: config(m).target_r == 3),
    "tinit": (2, lambda m: config(m).tinit == 2),
    "tfinal": (3, lambda m: config(m).tfinal == 3),
    "deltaT": (2, lambda m: config(m).deltaT == 2),
    "beta1": (0.5, lambda m: config(m).beta1 == 0.5),
    "beta2": (0.6, lambda m: config(m).beta2 == 0.6),
    "orth_reg_weight": (0.1, lambda m: config(m).orth_reg_weight == 0.1),
    "lora_alpha": (2.0, lambda m: {layer.scaling["default"] for layer in layers(m)} == {2.0}),
    "lora_dropout": (0.25, lambda m: {getattr(x.lora_dropout["default"], "p", 0) for x in layers(m)} == {0.25}),
    "target_modules": (("k_proj",), lambda m: all(n.endswith("k_proj") for n in names(m))),
    "exclude_modules": (("q_proj",), lambda m: all(n.endswith("down_proj") for n in names(m))),
    "layers_to_transform": (1, lambda m: all(".1." in n for n in names(m))),
    "modules_to_save": (("lm_head",), lambda m: any("lm_head" in n for n in read_tensors(m))),
    "peft_type": ("ADALORA", lambda m: len(layers(m)) == 4),
    "task_type": ("CAUSAL_LM", lambda m: config(m).task_type == "CAUSAL_LM"),
}
ELSEWHERE = {"bias", "fan_in_fan_out", "layers_pattern"}
"""Seen on phi and GPT-2, and beside another key."""
BESIDE = {
    "r": (4, "r=4 beside peft_type=ADALORA: ranks begin at init_r and come down to target_r: set r=null"),
    "use_rslora": (True, "use_rslora=true beside peft_type=ADALORA"),
    "use_dora": (True, "use_dora=true beside peft_type=ADALORA"),
    "init_lora_weights": ("pissa", "init_lora_weights=pissa beside peft_type=ADALORA: .*set it to true"),
    "lora_bias": (True, "lora_bias=true beside peft_type=ADALORA"),
    "rank_pattern": ({"q_proj": 2}, "rank_pattern={'q_proj': 2} beside peft_type=ADALORA: .*leave it out"),
    "alpha_pattern": ({"q_proj": 2.0}, "alpha_pattern={'q_proj': 2.0} beside peft_type=ADALORA"),
    "target_parameters": (("mlp.experts.down_proj",), "target_parameters=.* beside peft_type=ADALORA: .*fused experts"),
}


def config(model):
    return model.peft_config[ACTIVE]


def layers(model):
    return [layer for layer in model.modules() if isinstance(layer, SVDLinear)]


def names(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, SVDLinear)]


class TestKeys:
    @pytest.mark.parametrize("key", [field.name for field in fields(AdaLoraConfig)])
    def test_each_of_adalora_s_arrives_or_is_refused(self, key):
        assert sum(key in places for places in (SEEN, ELSEWHERE, BESIDE, REFUSED)) == 1

    def test_its_own_are_all_there(self):
        own = {field.name for field in fields(AdaLoraConfig)} - {field.name for field in fields(LoraConfig)}
        assert own == {*OF_ADALORA, "total_step"}
        assert {field.name for field in fields(AdaLora)} == set(OF_ADALORA)

    @pytest.mark.parametrize("key", SEEN)
    def test_each_is_seen_in_what_is_built_and_not_there_otherwise(self, key):
        value, seen = SEEN[key]
        assert seen(made(**{key: value}))
        if key not in ("peft_type", "task_type"):
            assert not seen(made())

    def test_those_that_want_a_base_or_a_key_of_their_own(self):
        assert {layer.fan_in_fan_out for layer in layers(made("gpt2", fan_in_fan_out=True))} == {True}
        assert any(n.endswith("base_layer.bias") for n in read_tensors(made("phi", bias="lora_only")))
        one = made(layers_to_transform=(0,), layers_pattern="layers")
        assert config(one).layers_pattern == "layers"
        assert all(".0." in name for name in names(one))

    @pytest.mark.parametrize("key", BESIDE)
    def test_what_it_has_no_layers_for_is_refused(self, key):
        value, match = BESIDE[key]
        with pytest.raises(UserError, match=match) as caught:
            lora_args(**{**ADA, key: value})
        assert len(caught.value.faults) == 1

    def test_defaults_of_those_are_not(self):
        plain = {
            "use_rslora": False,
            "use_dora": False,
            "init_lora_weights": True,
            "lora_bias": False,
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        assert lora_args(**{**ADA, **plain}).adalora == AdaLora(init_r=4, target_r=2)

    @pytest.mark.parametrize("key", OF_ADALORA)
    def test_its_keys_beside_lora_are_refused(self, key):
        with pytest.raises(UserError, match=f"{AT}.{key} beside peft_type=LORA, .*: set peft_type=ADALORA"):
            LoraArgs(r=4, lora_alpha=8.0, target_modules=None, **{key: 1})

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"target_r": 5}, "target_r=5 beside init_r=4: .*between 1 and init_r"),
            ({"target_r": 0}, "target_r=0 beside init_r=4"),
            ({"target_r": None}, "target_r=8 beside init_r=4: .*null: 8 and 12"),
            ({"init_r": 0, "target_r": 1}, "init_r=0 is no rank"),
            ({"tinit": -1}, "tinit=-1 must be a whole number of rounds from 0"),
            ({"tfinal": -1}, "tfinal=-1 must"),
            ({"deltaT": 0}, "deltaT=0 must be a whole number of rounds from 1"),
            ({"beta1": 0.0}, "beta1=0.0 must lie between 0 and 1"),
            ({"beta2": 1.0}, "beta2=1.0 must lie between 0 and 1"),
            ({"beta1": float("nan")}, "beta1=nan must"),
            ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1 must lie between 0"),
            ({"orth_reg_weight": float("nan")}, "orth_reg_weight=nan must"),
        ],
    )
    def test_values_that_mean_nothing_are_refused(self, changed, match):
        with pytest.raises(UserError, match=match) as caught:
            lora_args(**{**ADA, **changed})
        assert len(caught.value.faults) == 1

    def test_total_step_says_what_counts(self):
        reader = Reader({LoraArgs: REFUSED})
        reader.record(LoraArgs, {**ADA, "target_modules": ["q_proj"], "total_step": 5}, AT)
        assert reader.faults == [f"{AT}.total_step=5 is refused: {REFUSED['total_step']}"]


class TestRefused:
    def test_fused_experts(self):
        with pytest.raises(UserError, match="peft_type=ADALORA beside fused experts"):
            made("mixtral", target_modules=("gate_proj", "up_proj", "down_proj"))

    def test_a_loaded_adapter(self):
        plain = folded(acting(made()))
        args = lora_args(**{**ADA, "target_modules": None, "lora_alpha": None})
        with pytest.raises(UserError, match=r"peft_type=ADALORA beside an adapter that is loaded"):
            lora_config_of(args, plain, "base")

    def test_an_adapter_that_is_adalora_itself(self):
        args = lora_args(r=None, lora_alpha=None, target_modules=None)
        with pytest.raises(
            UserError, match=r"peft_type='ADALORA': a checkpoint of AdaLoRA .*name the run's own folder"
        ):
            lora_config_of(args, acting(made()), "base")

    def test_nothing_is_known_without_alpha_and_targets(self):
        args = lora_args(**{**ADA, "target_modules": None, "lora_alpha": None})
        with pytest.raises(UserError) as caught:
            lora_config_of(args, None, "base")
        assert [fault.split("=")[0].rpartition(".")[2] for fault in caught.value.faults] == [
            "lora_alpha",
            "target_modules",
        ]

    def test_a_quantised_base(self):
        with pytest.raises(UserError, match=r"quantization=torchao_int8 beside lora_config.peft_type=ADALORA"):
            ModelArgs(pretrained_model_name_or_path="x", quantization="torchao_int8", lora_config=lora_args(**ADA))

    def test_the_python_api_begins_plain_lora(self):
        with pytest.raises(UserError, match="peft_type=ADALORA: its ranks are given out by a run's server"):
            lora.begin(tiny("llama"), lora_args(**ADA))
