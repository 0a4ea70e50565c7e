"""The base model by itself: loaded once, frozen, never an adapter folder."""

import functools
import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from fedunlearn.config.model import ModelArgs
from fedunlearn.errors import UserError
from fedunlearn.models.quantized import quantization_config, stored_as

log = logging.getLogger(__name__)


def load_base(folder: Path, args: ModelArgs) -> PreTrainedModel:
    """Loads a full model, frozen and in eval mode, with torch_dtype's weights on its device, quantised where args say so.

    Raises UserError where the files cannot be loaded, or what is asked for (CUDA, a quantisation) cannot be had.
    """
    device = choose_device(args)
    _check_full(folder)
    transformers_logging.disable_progress_bar()
    attention = choose_attention(args.attn_implementation, device.type, args.torch_dtype)
    quantized = quantization_config(args, device)
    placed = {} if quantized is None else {"quantization_config": quantized, "device_map": {"": str(device)}}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, args.torch_dtype),
            attn_implementation=attention,
            output_loading_info=True,
            **placed,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"base model {str(folder)!r} cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"base model {str(folder)!r} lacks {len(missing)} of its tensors (first: {missing[0]!r}), which would start at random: fetch it again"
        )
    model.requires_grad_(False)
    loaded: PreTrainedModel = (model if placed else model.to(device)).eval()
    return loaded


def _check_full(folder: Path) -> None:
    """Raises UserError for a model that is stored quantised: what runs on it is rounded, and no fingerprint says from what. Other damage is the loader's to tell."""
    try:
        kind = stored_as(folder)
    except (OSError, ValueError):
        return
    if kind:
        raise UserError(
            f"base model {str(folder)!r} is stored quantised (its config.json has quantization_config, {kind}): name the model it was quantised from, "
            "and set model.model_args.quantization where it is to be held in 8 or 4 bits"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer. Raises UserError where the folder has none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"tokenizer {str(folder)!r} cannot be loaded: {error}; set model.tokenizer_args.pretrained_model_name_or_path"
        ) from error
    return tokenizer


def choose_device(args: ModelArgs) -> torch.device:
    """The device of model.model_args.device; `auto` is CUDA where there is one. Raises UserError for CUDA without a device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.model_args.device='cuda', but no CUDA device is here: use auto or cpu")
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(args.device)


@functools.cache
def choose_attention(wanted: str, device: str, dtype: str) -> str:
    """The attention implementation: flash_attention_2 falls back to sdpa where it cannot run, with one warning a process."""
    able = device == "cuda" and dtype != "float32" and is_flash_attn_2_available()
    if wanted == "flash_attention_2" and not able:
        log.warning(
            "model.model_args.attn_implementation=flash_attention_2 is not to be had here (needs CUDA, 16-bit weights and flash-attn): sdpa is used"
        )
        return "sdpa"
    return wanted
