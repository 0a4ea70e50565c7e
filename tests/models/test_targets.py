"""What names of targets mean in each architecture, on its skeleton, and what PEFT then builds."""

import logging
import warnings

import pytest
import torch
from helpers_architectures import ATTENTION, CONFIGS, EXPERTS, MLP, MOE, TIED, full, tiny
from helpers_models import lora_args
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from fedunlearn.config.lora import SEVEN
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import save_adapter
from fedunlearn.models.adapter_tensors import read_tensors, write_tensors
from fedunlearn.models.lora import attach_lora
from fedunlearn.models.lora_config import lora_config_of, plain_config
from fedunlearn.models.skeleton import skeleton
from fedunlearn.models.targets import find_targets
from fedunlearn.once import say_once
from fedunlearn.records.adapter import Adapter

AT = r"model\.model_args\.lora_config\."
RULES = ("fedunlearn.models.lora_rules", "fedunlearn.once")


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    say_once.cache_clear()


def config_of(kind, targets, **changed):
    words = targets if isinstance(targets, str | None) else tuple(targets)
    if "preset" in changed:
        changed = {"adapts": ("target_modules", "lora_dropout"), **changed}
    return lora_config_of(lora_args(target_modules=words, **changed), None, "base", skeleton(CONFIGS[kind]))


def found(kind, targets, **changed):
    """Full names of all that has factors."""
    targets = find_targets(skeleton(CONFIGS[kind]), config_of(kind, targets, **changed))
    return targets.modules | targets.experts


def built(model):
    """Full names of all that PEFT put factors on."""
    names = set()
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            own = f".{layer.parameter_name}" if isinstance(layer, ParamWrapper) else ""
            names.add(path.replace(".base_layer", "") + own)
    return names


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name in RULES]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("word", ["attention", "mlp", "all-linear"])
def test_each_word_in_each_architecture(kind, word):
    """The router, the embeddings and the head have none. What is built is what was found, and no warning of PEFT's comes with it."""
    names = {"attention": ATTENTION[kind], "mlp": MLP[kind], "all-linear": (*ATTENTION[kind], *MLP[kind])}[word]
    config = config_of(kind, word)
    assert found(kind, word) == full(kind, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        model = attach_lora(tiny(kind), config)
    assert built(model) == full(kind, names)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_saved_means_the_same_to_plain_peft(kind, tmp_path):
    """The folder's config alone builds the same factors there, and equal logits."""
    model = attach_lora(tiny(kind), config_of(kind, "all-linear"))
    generator = torch.Generator().manual_seed(1)
    write_tensors(model, {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in read_tensors(model).items()})
    plain = plain_config(config_of(kind, "all-linear"))
    save_adapter(tmp_path / "a", Adapter(read_tensors(model), plain, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        theirs = PeftModel.from_pretrained(tiny(kind), tmp_path / "a").eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, model(input_ids=ids).logits)
        assert (model(input_ids=ids).logits - tiny(kind)(input_ids=ids).logits).abs().max() > 1e-3


class TestNames:
    def test_a_list_stays_as_it_is_written(self):
        assert config_of("llama", SEVEN).target_modules == set(SEVEN)

    def test_a_word_becomes_the_shortest_names(self):
        assert config_of("llama", "attention").target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert config_of("gpt2", "attention").target_modules == {"c_attn", "attn.c_proj"}
        assert config_of("gpt2", "mlp").target_modules == {"c_fc", "mlp.c_proj"}

    def test_a_word_may_stand_in_a_list(self):
        assert found("llama", ["attention", "down_proj"]) == full("llama", (*ATTENTION["llama"], "mlp.down_proj"))

    def test_c_proj_alone_names_that_of_the_mlp_too(self):
        assert found("gpt2", ["c_proj"]) == full("gpt2", ("attn.c_proj", "mlp.c_proj"))

    def test_a_pattern(self):
        assert found("llama", r".*layers\.1.*(q|v)_proj") == full(
            "llama", ("self_attn.q_proj", "self_attn.v_proj"), (1,)
        )

    def test_resolving_twice_changes_nothing(self):
        for kind in CONFIGS:
            base, once = skeleton(CONFIGS[kind]), config_of(kind, "all-linear")
            first = find_targets(base, once)
            assert set(first.said_modules) == once.target_modules
            assert list(first.said_experts) == (once.target_parameters or [])

    def test_a_pattern_with_layers_beside_it_is_put_as_names(self):
        """PEFT refuses the two together."""
        assert found("llama", r".*(q|v)_proj", layers_to_transform=1) == full(
            "llama", ("self_attn.q_proj", "self_attn.v_proj"), (1,)
        )

    @pytest.mark.parametrize("kind", ["llama", "gpt2", *MOE])
    def test_filters_act_on_every_kind_of_target(self, kind):
        """Fused experts among them, of which PEFT's own filters know nothing."""
        names = (*ATTENTION[kind], *MLP[kind])
        assert found(kind, "all-linear", layers_to_transform=(1,)) == full(kind, names, (1,))
        assert found(kind, "all-linear", exclude_modules=(names[0].split(".")[1],)) == full(kind, names[1:])
        assert found(kind, "all-linear", exclude_modules=(names[-1],)) == full(kind, names[:-1])
        config = config_of(kind, "all-linear", layers_to_transform=(1,), exclude_modules=(names[0],))
        assert built(attach_lora(tiny(kind), config)) == full(kind, names[1:], (1,))

    def test_layers_pattern_says_which_numbers_are_meant(self):
        assert found("llama", ["q_proj"], layers_to_transform=(0,), layers_pattern="layers") == full(
            "llama", ("self_attn.q_proj",), (0,)
        )
        with pytest.raises(UserError, match=r"layers_to_transform names layer 0, .* stand in no numbered layer"):
            found("llama", ["q_proj"], layers_to_transform=(0,), layers_pattern="blocks")


class TestRefused:
    @pytest.mark.parametrize(
        ("kind", "targets", "match"),
        [
            ("llama", ["qproj"], "'qproj' matches no module of this base; linear ones are down_proj, gate_proj"),
            ("llama", ["embed_tokens"], r"matches model\.embed_tokens, an embedding: its rows are looked up"),
            ("llama", ["input_layernorm"], "matches LlamaRMSNorm, which is no linear layer"),
            ("llama", ["self_attn"], "matches LlamaAttention, which is no linear layer"),
            ("llama", ".*", "matches LlamaModel, which is no linear layer"),
            ("gpt2", ["lm_head"], "matches lm_head, whose weight is the embedding's"),
            ("gpt2", ["wte"], r"matches transformer\.wte, an embedding"),
            ("gpt2", ["q_proj"], "'q_proj' matches no module of this base; linear ones are c_attn, c_fc, c_proj"),
            ("qwen3_moe", ["gate"], r"matches model\.layers\.0\.mlp\.gate, the router, which is never trained"),
            ("mixtral", ["gate"], r"matches model\.layers\.0\.mlp\.gate, the router"),
            (
                "mixtral",
                ["router"],
                "'router' matches no module of this base; .*fused experts are mlp.experts.down_proj",
            ),
            ("mixtral", r".*mlp\.gate", "the router, which is never trained"),
            ("mixtral", ["experts"], "matches MixtralExperts, which is no linear layer"),
            (
                "qwen3_moe",
                ["gate_proj"],
                "'gate_proj' without up_proj: in this base's experts they are one fused parameter",
            ),
            ("mixtral", ["up_proj"], "'up_proj' without gate_proj"),
            ("mixtral", ["w1", "w2"], "'w1' without w3"),
        ],
    )
    def test_by_the_reason(self, kind, targets, match):
        with pytest.raises(UserError, match=match):
            found(kind, targets)

    @pytest.mark.parametrize("kind", TIED)
    def test_a_tied_head_and_its_embedding(self, kind):
        embedding = "wte" if kind == "gpt2" else "embed_tokens"
        with pytest.raises(UserError, match="whose weight is the embedding's") as caught:
            found(kind, ["lm_head", embedding])
        assert len(caught.value.faults) == 2

    def test_a_head_of_its_own_may_have_one(self):
        assert found("llama", ["lm_head"]) == {"lm_head"}

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"exclude_modules": ("k_proj",)}, r"exclude_modules: 'k_proj' excludes nothing"),
            ({"exclude_modules": ("q_proj", "v_proj")}, "nothing is left of them after exclude_modules="),
            ({"layers_to_transform": (0, 2)}, r"layers_to_transform names layer 2, which is none of this base's targets' \(0 to 1\)"),
            ({"modules_to_save": ("self_attn",)}, "nothing is left of them after modules_to_save="),
            ({"target_parameters": ("q_proj.weight",)}, "'q_proj.weight' names no fused experts of this base"),
            ({"rank_pattern": {"o_proj": 2}}, "rank_pattern: 'o_proj' matches none of the target modules"),
            ({"alpha_pattern": {"q_[": 2.0}}, r"alpha_pattern: 'q_\[' is no regular expression"),
            ({"rank_pattern": {"q_proj": 2, ".*proj": 3}}, r"is matched by 'q_proj' \(2\) and by '\.\*proj' \(3\)"),
            ({"exclude_modules": "["}, r"exclude_modules='\[' is no regular expression"),
            ({"layers_to_transform": (0,), "layers_pattern": ("[",)}, r"layers_pattern='\[' is no regular expression"),
            ({"layers_to_transform": (0,), "layers_pattern": "(h|layers)"}, r"layers_pattern='\(h\|layers\)' has a group"),
            ({"fan_in_fan_out": True}, r"fan_in_fan_out=true: the targets are linear layers, \[out, in\]; leave it null"),
        ],
    )  # fmt: skip
    def test_filters_and_patterns_that_mean_nothing(self, changed, match):
        with pytest.raises(UserError, match=match):
            found("llama", ["q_proj", "v_proj"], **changed)

    def test_all_patterns_at_once_and_whose_they_are(self):
        config = LoraConfig(target_modules="q_[", exclude_modules="[")
        with pytest.raises(UserError, match=r"^the adapter's target_modules='q_\['") as caught:
            find_targets(skeleton(CONFIGS["llama"]), config, "the adapter's ")
        assert [fault.split("=")[0] for fault in caught.value.faults] == [
            "the adapter's target_modules",
            "the adapter's exclude_modules",
        ]

    def test_conv1d_said_to_be_linear(self):
        with pytest.raises(
            UserError, match=r"fan_in_fan_out=false: the targets are Conv1D, which stores its weight \[in, out\]"
        ):
            found("gpt2", "attention", fan_in_fan_out=False)
        assert config_of("gpt2", "attention").fan_in_fan_out is True
        assert config_of("gpt2", "attention", fan_in_fan_out=True).fan_in_fan_out is True
        assert config_of("llama", "attention").fan_in_fan_out is False

    def test_all_faults_come_at_once(self):
        with pytest.raises(UserError, match="qproj") as caught:
            found("llama", ["qproj", "embed_tokens", "v_proj"], target_parameters=("a.b",), exclude_modules=("k_proj",))
        assert len(caught.value.faults) == 4


@pytest.mark.parametrize("kind", MOE)
class TestExperts:
    def test_the_seven_names_of_llama_mean_attention_and_experts(self, kind):
        config = config_of(kind, SEVEN)
        assert found(kind, SEVEN) == full(kind, (*ATTENTION[kind], *EXPERTS))
        assert config.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
        assert config.target_parameters == sorted(EXPERTS)

    @pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w2", "w3"), EXPERTS])
    def test_experts_alone(self, kind, names):
        assert found(kind, names) == full(kind, EXPERTS)
        assert config_of(kind, names).target_modules == set()
        assert found(kind, (), target_parameters=EXPERTS) == full(kind, EXPERTS)

    def test_every_factor_has_rank_r_and_its_scale(self, kind):
        """PEFT's own conversion of the names would double both for gate and up."""
        model = attach_lora(tiny(kind), config_of(kind, SEVEN))
        experts = {"qwen3_moe": 4, "mixtral": 3}[kind]
        layers = [layer for layer in model.modules() if isinstance(layer, ParamWrapper)]
        assert len(layers) == 4
        assert {len(layer.lora_A["default"].weight) for layer in layers} == {4 * experts}
        assert {layer.scaling["default"] for layer in layers} == {2.0}
        assert model.peft_config["default"].rank_pattern == {}

    def test_by_its_own_words_peft_would_train_the_router_or_double_the_rank(self, kind):
        """Why names are never left to it; where this fails, PEFT has changed."""
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        theirs = get_peft_model(tiny(kind), config)
        assert "gate.weight" in theirs.peft_config["default"].target_parameters
        assert 8 in theirs.peft_config["default"].rank_pattern.values()

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"lora_dropout": 0.25}, "lora_dropout=0.25 beside fused experts"),
            ({"use_dora": True}, "use_dora=true beside fused experts"),
            ({"lora_bias": True}, "lora_bias=true beside fused experts"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa beside fused experts"),
            ({"rank_pattern": {"down_proj": 2}}, "rank_pattern: 'down_proj' names fused experts"),
            ({"alpha_pattern": {".*experts.*": 2.0}}, "alpha_pattern: '.*experts.*' names fused experts"),
        ],
    )
    def test_what_they_do_not_take_is_refused_by_name(self, kind, changed, match):
        with pytest.raises(UserError, match=match.replace(".*e", r"\.\*e").replace("s.*'", r"s\.\*'")):
            config_of(kind, SEVEN, **changed)
        if "rank_pattern" not in changed and "alpha_pattern" not in changed:
            assert config_of(kind, "attention", **changed).r == 4

    @pytest.mark.parametrize(("preset", "dropout"), [("balanced", 0.1), ("high", 0.05)])
    def test_a_preset_s_dropout_is_zero_and_said(self, kind, preset, dropout, caplog):
        config = config_of(kind, SEVEN, preset=preset, lora_dropout=dropout)
        assert config_of(kind, SEVEN, preset=preset, lora_dropout=dropout).lora_dropout == 0
        assert config.lora_dropout == 0
        assert len(said(caplog)) == 1
        assert f"lora={preset}: its lora_dropout={dropout:g} is 0 here" in said(caplog)[0]

    def test_a_preset_s_dropout_that_somebody_changed_is_that_one_s(self, kind):
        with pytest.raises(UserError, match=r"lora_dropout=0\.2 beside fused experts"):
            config_of(kind, SEVEN, preset="balanced", lora_dropout=0.2)

    def test_a_dropout_that_is_written_down_is_never_changed_though_it_equals_the_preset_s(self, kind):
        with pytest.raises(UserError, match=r"lora_dropout=0\.1 beside fused experts"):
            config_of(kind, SEVEN, preset="balanced", lora_dropout=0.1, adapts=("target_modules",))

    @pytest.mark.parametrize("word", ["gate", "mlp"])
    def test_the_router_is_no_saved_module_either(self, kind, word):
        with pytest.raises(
            UserError, match=rf"modules_to_save: '{word}' holds .*gate, the router, which is never trained"
        ):
            config_of(kind, "attention", modules_to_save=(word,))

    def test_a_preset_without_experts_keeps_its_dropout(self, kind, caplog):
        assert config_of(kind, ("q_proj", "v_proj"), preset="fast", lora_dropout=0.1).lora_dropout == 0.1
        assert not said(caplog)


class TestPresets:
    @pytest.mark.parametrize(
        ("kind", "names"),
        [
            ("gpt2", ("attn.c_attn",)),
            ("phi3", ("self_attn.qkv_proj",)),
            ("phi", ("self_attn.q_proj", "self_attn.v_proj")),
        ],
    )
    def test_fast_where_queries_and_values_are_fused(self, kind, names, caplog):
        assert found(kind, ("q_proj", "v_proj"), preset="fast") == full(kind, names)
        assert bool(said(caplog)) == (kind != "phi")

    @pytest.mark.parametrize("kind", ["gpt2", "phi3", "phi"])
    def test_the_seven_where_layers_have_other_names(self, kind, caplog):
        config = config_of(kind, SEVEN, preset="balanced")
        assert find_targets(skeleton(CONFIGS[kind]), config).modules == full(kind, (*ATTENTION[kind], *MLP[kind]))
        assert len(said(caplog)) == 1
        assert "this base has no layers called q_proj" in said(caplog)[0]
        with pytest.raises(UserError, match="matches no module"):
            config_of(kind, SEVEN)

    def test_targets_that_are_written_down_stay_though_they_equal_the_preset_s(self):
        with pytest.raises(UserError, match="'q_proj' matches no module"):
            config_of("gpt2", ("q_proj", "v_proj"), preset="fast", adapts=("lora_dropout",))

    def test_other_targets_beside_a_preset_are_the_user_s(self):
        with pytest.raises(UserError, match="'q_proj' matches no module"):
            config_of("gpt2", ("q_proj",), preset="fast")


class TestRanks:
    def test_patterns_arrive_in_what_is_built(self):
        config = config_of(
            "llama", ["q_proj", "k_proj"], rank_pattern={"k_proj": 2}, alpha_pattern={r"layers\.1.*": 3.0}
        )
        model = attach_lora(tiny("llama"), config)
        ranks = {n: len(t) for n, t in read_tensors(model).items() if "lora_A" in n}
        assert {rank for name, rank in ranks.items() if "k_proj" in name} == {2}
        assert {rank for name, rank in ranks.items() if "q_proj" in name} == {4}

    def test_a_rank_above_the_smaller_side_is_said_once(self, caplog):
        with caplog.at_level(logging.WARNING):
            attach_lora(tiny("llama"), config_of("llama", ["q_proj", "k_proj"], r=17, lora_alpha=34.0))
        assert said(caplog) == [
            "model.model_args.lora_config.r=17 is above the smaller side of 2 of 4 targets (model.layers.0.self_attn.k_proj has 16): "
            "what lies beyond adds parameters and no rank"
        ]

    @pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
    def test_one_that_fits_is_taken_in_silence(self, kind, caplog):
        with caplog.at_level(logging.WARNING):
            attach_lora(tiny(kind), config_of(kind, "attention", r=16, lora_alpha=32.0))
        assert not said(caplog)


class TestSavedModules:
    @pytest.mark.parametrize(
        ("kind", "word", "match"),
        [
            ("llama", "norm", r"'norm' names model.norm, but PEFT would train model.layers.0.input_layernorm too, which ends alike: give the whole name, 'model.norm'"),
            ("llama", "proj", r"'proj' is no module's name, only the end of one \(model.layers.0.mlp.down_proj\)"),
            ("llama", "act_fn", r"'act_fn' has no parameters \(model.layers.0.mlp.act_fn\)"),
            ("llama", "rotary_emb", r"'rotary_emb' has no parameters"),
        ],
    )  # fmt: skip
    def test_what_peft_would_take_for_more_or_for_nothing_is_refused(self, kind, word, match):
        with pytest.raises(UserError, match=f"modules_to_save: {match}"):
            config_of(kind, "attention", modules_to_save=(word,))

    def test_the_whole_name_is_taken(self):
        assert config_of("llama", "attention", modules_to_save=("model.norm",)).modules_to_save == ["model.norm"]

    def test_targets_inside_and_tied_weights_are_told_once(self, caplog):
        for _ in range(2):
            assert config_of("llama", SEVEN, modules_to_save=("o_proj",)).modules_to_save == ["o_proj"]
            assert config_of("gpt2", "attention", modules_to_save=("wte",)).modules_to_save == ["wte"]
        whole, tied = said(caplog)
        assert (
            "modules_to_save=['o_proj']: what is trained whole has no pair; 2 of target_modules lie in there (model.layers.0.self_attn.o_proj)"
            in whole
        )
        assert (
            "modules_to_save=['wte']: its weight is one with the head's in this base; from here on the two part" in tied
        )
