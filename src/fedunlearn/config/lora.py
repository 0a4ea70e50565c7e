"""The record of `model.model_args.lora_config`: PEFT's own names, and why some of them are refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from fedunlearn.aggregation.adalora import AdaLora
from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST, SMALLEST

Preset = Literal["fast", "balanced", "high"]
PRESET_DROPOUT: Mapping[Preset, float] = MappingProxyType({"fast": 0.1, "balanced": 0.1, "high": 0.05})
HIGHEST = 65_536
"""No matrix of a model has more rows than that but a vocabulary's."""
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PRESET_TARGETS: Mapping[Preset, tuple[str, ...]] = MappingProxyType(
    {"fast": ("q_proj", "v_proj"), "balanced": SEVEN, "high": SEVEN}
)
"""What the files of configs/lora/ say of dropout and targets: a base that cannot take it, or calls its layers otherwise, gets what comes nearest."""
INITIALISATIONS = re.compile(r"gaussian|orthogonal|olora|pissa|pissa_niter_[1-9]\d{0,2}")
AT = "model.model_args.lora_config."
OF_ADALORA = tuple(field.name for field in fields(AdaLora))
"""The keys that PEFT's AdaLoraConfig has beside LoraConfig's, but for total_step."""


@dataclass(frozen=True, kw_only=True)
class LoraArgs:
    """What PEFT's LoraConfig is made of, under PEFT's names; null = take it from the adapter that is loaded, or PEFT's default.

    r: rank. lora_alpha: the update is scaled by lora_alpha / r (use_rslora: by its root). target_modules: module names, `attention`, `mlp`,
    `all-linear` or a regular expression, [] for target_parameters alone; exclude_modules: names among them that are left out. target_parameters: fused experts by name.
    layers_to_transform: numbers of the layers that get an adapter, layers_pattern: what the list of layers is called. rank_pattern, alpha_pattern: module
    name or pattern -> its own rank or alpha. use_dora: magnitudes apart (arXiv:2402.09353). init_lora_weights: true (A uniform, B zero), gaussian, orthogonal,
    pissa, pissa_niter_N (arXiv:2404.02948), olora (arXiv:2406.01775). bias: the base's biases that are trained too; lora_bias: one beside every B.
    modules_to_save: modules trained whole, which travel with the adapter. fan_in_fan_out: whether weights are stored [in, out]; null: looked at, layer by layer.
    lora_dropout always comes from here, never from a loaded adapter. preset: whose values these are where `lora=` chose one;
    adapts: which of them, where they are the preset's own, a base that cannot take them gets otherwise (what the command line says never).
    peft_type: LORA (null too), or ADALORA (arXiv:2303.10512), whose own keys are init_r to orth_reg_weight (aggregation.adalora.AdaLora; null: PEFT's defaults).
    """

    r: int | None
    lora_alpha: float | None
    target_modules: tuple[str, ...] | str | None
    lora_dropout: float = 0.0
    use_rslora: bool | None = None
    use_dora: bool | None = None
    init_lora_weights: bool | str | None = None
    bias: Literal["none", "all", "lora_only"] | None = None
    lora_bias: bool | None = None
    modules_to_save: tuple[str, ...] | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_parameters: tuple[str, ...] | None = None
    fan_in_fan_out: bool | None = None
    task_type: Literal["CAUSAL_LM"] = "CAUSAL_LM"
    preset: Preset | None = None
    adapts: tuple[Literal["target_modules", "lora_dropout"], ...] = ()
    peft_type: Literal["LORA", "ADALORA"] | None = None
    init_r: int | None = None
    target_r: int | None = None
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int | None = None  # noqa: N815 - PEFT's name
    beta1: float | None = None
    beta2: float | None = None
    orth_reg_weight: float | None = None

    def __post_init__(self) -> None:
        rules = (*self._number_rules(), *self._name_rules(), *self._adalora_rules())
        faults = [fault for holds, fault in rules if not holds]
        if faults:
            raise UserError(*faults)

    @property
    def adalora(self) -> AdaLora | None:
        """AdaLoRA's own settings; None for plain LoRA."""
        own = {key: getattr(self, key) for key in OF_ADALORA}
        return AdaLora(**{k: v for k, v in own.items() if v is not None}) if self.peft_type == "ADALORA" else None

    def _adalora_rules(self) -> list[tuple[bool, str]]:
        if self.adalora is not None:
            return [*self._without_layers(), *_budget_rules(self.adalora)]
        given = [key for key in OF_ADALORA if getattr(self, key) is not None]
        return [
            (
                not given,
                f"{AT}{', '.join(given)} beside peft_type=LORA, which has no budget of ranks: set peft_type=ADALORA (and r=null), or leave them out",
            )
        ]

    def _without_layers(self) -> list[tuple[bool, str]]:
        """What PEFT's AdaLoRA layers do not have, and mostly pass over in silence."""
        why = {
            "r": "ranks begin at init_r and come down to target_r: set r=null",
            "use_rslora": "AdaLoRA divides lora_alpha by init_r: set it to false",
            "use_dora": "AdaLoRA has no magnitudes: set it to false, or peft_type=LORA",
            "init_lora_weights": "AdaLoRA begins with singular values of 0 between factors of its own: set it to true",
            "lora_bias": "AdaLoRA's layers have no bias: set it to false, or peft_type=LORA",
            "rank_pattern": "which module gets which rank is what AdaLoRA finds out: leave it out",
            "alpha_pattern": "AdaLoRA's layers have one lora_alpha: leave it out",
            "target_parameters": "AdaLoRA has no layer for fused experts: name linear layers in target_modules, or set peft_type=LORA",
        }
        return [
            (
                value in (None, False, {}, ()) or (key == "init_lora_weights" and value is True),
                f"{AT}{key}={str(value).lower() if isinstance(value, bool) else value} beside peft_type=ADALORA: {told}",
            )
            for key, told in why.items()
            for value in [getattr(self, key)]
        ]

    def _number_rules(self) -> list[tuple[bool, str]]:
        ranks = {f"rank_pattern[{name!r}]": rank for name, rank in (self.rank_pattern or {}).items()}
        alphas = {f"alpha_pattern[{name!r}]": alpha for name, alpha in (self.alpha_pattern or {}).items()}
        layers = self.layers_to_transform
        listed = (layers,) if isinstance(layers, int) else layers
        return [
            *(
                (rank is None or 1 <= rank <= HIGHEST, f"{AT}{key}={rank} is no rank: a whole number from 1 to {HIGHEST}, or null for a loaded adapter's")
                for key, rank in {"r": self.r, **ranks}.items()
            ),
            *(
                (alpha is None or SMALLEST <= alpha <= LARGEST, f"{AT}{key}={alpha} must lie between 1e-6 and 1e6")
                for key, alpha in {"lora_alpha": self.lora_alpha, **alphas}.items()
            ),
            (0 <= self.lora_dropout < 1, f"{AT}lora_dropout={self.lora_dropout} must lie in [0, 1)"),
            (
                listed is None or (bool(listed) and min(listed) >= 0 and len(set(listed)) == len(listed)),
                f"{AT}layers_to_transform={layers} must name layers by number, from 0, each once, and at least one; null: all",
            ),
            (
                self.layers_pattern is None or layers is not None,
                f"{AT}layers_pattern={self.layers_pattern!r} beside layers_to_transform=null: it says where layers are numbered; give both or neither",
            ),
        ]  # fmt: skip

    def _name_rules(self) -> list[tuple[bool, str]]:
        initial = self.init_lora_weights
        return [
            *(
                (
                    not isinstance(names, tuple) or ((bool(names) or self._only_experts(key)) and len(set(names)) == len(names)),
                    f"{AT}{key}={list(names or ())} must name each module once, and at least one",
                )
                for key, names in self._lists().items()
            ),
            (
                initial is None or initial is True or (isinstance(initial, str) and INITIALISATIONS.fullmatch(initial) is not None),
                f"{AT}init_lora_weights={initial!r} is not understood; allowed: true, gaussian, orthogonal, pissa, pissa_niter_N, olora "
                "(false would begin away from the base; eva, corda, loftq, lora_ga and mica read data or a quantised base before the first round)",
            ),
            (
                not (self.lora_bias and self.use_dora),
                f"{AT}lora_bias=true beside use_dora=true: PEFT knows a bias in B for plain LoRA only; set one of them to false",
            ),
            (
                not (self.lora_bias and initial not in (None, True)),
                f"{AT}lora_bias=true beside init_lora_weights={initial!r}: PEFT knows a bias in B for plain LoRA only; set lora_bias=false, or init_lora_weights=true",
            ),
            (
                not (self.use_dora and initial not in (None, True, "gaussian")),
                f"{AT}use_dora=true beside init_lora_weights={initial!r}: the magnitudes are those of the base's own weights; leave it at true or gaussian",
            ),
        ]  # fmt: skip

    def _only_experts(self, key: str) -> bool:
        return key == "target_modules" and bool(self.target_parameters)

    def _lists(self) -> dict[str, tuple[str, ...] | str | None]:
        return {
            "target_modules": self.target_modules,
            "modules_to_save": self.modules_to_save,
            "exclude_modules": self.exclude_modules,
            "target_parameters": self.target_parameters,
        }


def _budget_rules(budget: AdaLora) -> list[tuple[bool, str]]:
    at = f"{AT}target_r={budget.target_r} beside init_r={budget.init_r}"
    return [
        (budget.init_r >= 1, f"{AT}init_r={budget.init_r} is no rank: a whole number from 1"),
        (
            1 <= budget.target_r <= max(budget.init_r, 1),
            f"{at}: the mean rank at the end must lie between 1 and init_r (null: {AdaLora.target_r} and {AdaLora.init_r}); equal to it nothing is given up",
        ),
        *(
            (getattr(budget, key) >= least, f"{AT}{key}={getattr(budget, key)} must be a whole number of rounds from {least}")
            for key, least in {"tinit": 0, "tfinal": 0, "deltaT": 1}.items()
        ),
        *(
            (0 < getattr(budget, key) < 1, f"{AT}{key}={getattr(budget, key)} must lie between 0 and 1, without either: PEFT's default is 0.85")
            for key in ("beta1", "beta2")
        ),
        (
            0 <= budget.orth_reg_weight <= LARGEST,
            f"{AT}orth_reg_weight={budget.orth_reg_weight} must lie between 0 (no penalty) and 1e6",
        ),
    ]  # fmt: skip


def without_adalora(args: LoraArgs) -> LoraArgs:
    """Gives what is left of it beside an adapter that is loaded, which is plain LoRA and has an alpha of its own; plain LoRA's as it is."""
    if args.adalora is None:
        return args
    nulls: dict[str, Any] = dict.fromkeys(("peft_type", "lora_alpha", *OF_ADALORA))
    return replace(args, **nulls)


def given(args: LoraArgs) -> dict[str, object]:
    """Gives what is not null, lists as lists: what PEFT's LoraConfig is called with. Without what the preset said of itself."""
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.name not in ("preset", "adapts")}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None
    }


REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "total_step": "AdaLoRA's schedule counts rounds here, for the server gives out ranks, and trainer.federated.num_rounds says how many there are: leave it out",
        "auto_mapping": "PEFT writes it for itself: leave it out",
        "peft_version": "PEFT writes it for itself: leave it out",
        "base_model_name_or_path": "the base is model.model_args.pretrained_model_name_or_path: leave it out",
        "revision": "give the folder of that revision as model.model_args.pretrained_model_name_or_path",
        "inference_mode": "a run's adapter is trained, an evaluation's is not, whatever it says: leave it out",
        "megatron_config": "clients hold a transformers model, no Megatron one: leave it out",
        "megatron_core": "clients hold a transformers model, no Megatron one: leave it out",
        "trainable_token_indices": "rows of an embedding are no factors that could be averaged by client: name the whole module in modules_to_save",
        "loftq_config": "it changes the base by what a quantiser left; quantise by model.model_args.quantization",
        "eva_config": "it reads a client's data before the first round, and clients would begin apart: choose init_lora_weights=pissa",
        "corda_config": "it reads a client's data before the first round, and clients would begin apart: choose init_lora_weights=pissa",
        "lora_ga_config": "it reads a client's data before the first round, and clients would begin apart: choose init_lora_weights=pissa",
        "velora_config": "it changes how activations are stored, not the adapter: set trainer.args.gradient_checkpointing=true",
        "alora_invocation_tokens": "an adapter that acts from a token on only cannot answer for the rows before it: leave it out",
        "use_qalora": "it pools inputs by groups of a quantised base, and factors change shape: leave it out",
        "qalora_group_size": "it pools inputs by groups of a quantised base, and factors change shape: leave it out",
        "monteclora_config": "it samples factors, and what is averaged would be noise: leave it out",
        "layer_replication": "it builds another base, and the base's fingerprint would be another's: leave it out",
        "runtime_config": "it only says where PEFT computes: leave it out",
        "use_bdlora": "its factors are blocks, which no reducer here knows: leave it out",
        "arrow_config": "it routes between finished adapters, and nothing of it is trained: leave it out",
        "kasa_config": "it truncates the base's own weights, which stay as they are stored: choose init_lora_weights=pissa",
        "ensure_weight_tying": "a head tied to its embedding is refused as a target: leave it out",
    }
)
"""Keys of PEFT's LoraConfig and AdaLoraConfig that no run takes, each with the reason and the way out."""
