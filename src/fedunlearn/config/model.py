"""Records of the `model` group: base, LoRA, tokenizer and the words around a question."""

from dataclasses import dataclass, field
from typing import Literal

from fedunlearn.config.lora import LoraArgs
from fedunlearn.errors import UserError

Dtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "fp4", "int8", "torchao_int8", "torchao_int4"]
BITSANDBYTES: tuple[Quantization, ...] = ("nf4", "fp4", "int8")


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """Base model and adapter.

    pretrained_model_name_or_path: hub id, folder of a full model, PEFT adapter folder, run of ours, or `pocket:SEED`.
    lora_model_path: adapter folder or run to resume from (trainable).
    torch_dtype: dtype of the base's weights; adapters are float32 whatever it is. device: `auto` takes CUDA where it is.
    quantization: what the base's linear layers are rounded to as they are loaded; torch_dtype is what they then compute in. nf4, fp4 (QLoRA,
    arXiv:2305.14314), int8 (arXiv:2208.07339): bitsandbytes, on CUDA. torchao_int8, torchao_int4: weights alone, on any device. null: none.
    """

    pretrained_model_name_or_path: str
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    torch_dtype: Dtype = "float32"
    quantization: Quantization | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    use_lora: bool = True
    lora_config: LoraArgs | None = None
    lora_model_path: str | None = None

    def __post_init__(self) -> None:
        faults = [fault for holds, fault in self._rules() if not holds]
        if faults:
            raise UserError(*faults)

    def _rules(self) -> list[tuple[bool, str]]:
        lora, said = self.lora_config, f"model.model_args.quantization={self.quantization}"
        initial = None if lora is None else lora.init_lora_weights
        return [
            (
                self.quantization is None or lora is None or lora.adalora is None,
                f"{said} beside lora_config.peft_type=ADALORA: it is untried over a rounded base, and PEFT has such layers for bitsandbytes alone; set "
                "quantization=null, or peft_type=LORA",
            ),
            (
                not self.use_lora or lora is not None,
                "model.model_args.lora_config=null with use_lora=true: give r, lora_alpha and target_modules (null = the loaded adapter's)",
            ),
            (
                self.use_lora or lora is None or lora.preset is None,
                f"lora={None if lora is None else lora.preset} with model.model_args.use_lora=false, where no adapter is: leave one of the two out",
            ),
            (
                self.use_lora or self.lora_model_path is None,
                f"model.model_args.use_lora=false with lora_model_path={self.lora_model_path!r}: set use_lora=true or leave the path out",
            ),
            (
                self.quantization not in BITSANDBYTES or self.device != "cpu",
                f"{said} needs CUDA, and model.model_args.device=cpu: set device=auto, or choose torchao_int8, which runs on any device",
            ),
            (
                self.quantization is None or not isinstance(initial, str) or not initial.startswith(("pissa", "olora")),
                f"{said} beside lora_config.init_lora_weights={initial!r}, which decomposes the weights as they are stored: leave one of the two out",
            ),
            (
                not str(self.quantization).startswith("torchao") or lora is None or not lora.lora_bias,
                f"{said} beside lora_config.lora_bias=true: PEFT has none over torchao's layers; leave it out, or take nf4 or int8",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class TokenizerArgs:
    """pretrained_model_name_or_path: a tokenizer other than the base's own; null = the base's."""

    pretrained_model_name_or_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class TemplateArgs:
    """How a question becomes a prompt: the tokenizer's chat template, or tags for models without one.

    date_string is handed to the chat template (Llama-3.x else writes today's date into every prompt).
    The five tags are used only with apply_chat_template=false; asst_end_tag closes few-shot answers only.
    """

    apply_chat_template: bool = True
    system_prompt: str | None = None
    date_string: str | None = None
    system_prompt_with_special_tokens: str | None = None
    user_start_tag: str | None = None
    user_end_tag: str | None = None
    asst_start_tag: str | None = None
    asst_end_tag: str | None = None

    def __post_init__(self) -> None:
        tags = (self.user_start_tag, self.user_end_tag, self.asst_start_tag, self.asst_end_tag)
        given = [tag for tag in (*tags, self.system_prompt_with_special_tokens) if tag is not None]
        if self.apply_chat_template and given:
            raise UserError(
                "model.template_args: tags are set beside apply_chat_template=true, which ignores them: set it to false or the tags to null"
            )
        if not self.apply_chat_template and any(tag is None for tag in tags):
            raise UserError(
                "model.template_args: apply_chat_template=false needs user_start_tag, user_end_tag, asst_start_tag and asst_end_tag (''  is allowed)"
            )
        if not self.apply_chat_template and (self.system_prompt is not None or self.date_string is not None):
            raise UserError(
                "model.template_args: system_prompt and date_string belong to a chat template; with tags use system_prompt_with_special_tokens"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole `model` group."""

    model_args: ModelArgs
    tokenizer_args: TokenizerArgs = field(default_factory=TokenizerArgs)
    template_args: TemplateArgs = field(default_factory=TemplateArgs)
