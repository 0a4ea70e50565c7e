"""A base without its weights: every module and shape, on the meta device, from its config alone."""

import copy
import functools
import json
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fedunlearn.errors import UserError


def skeleton(source: Path | PretrainedConfig) -> PreTrainedModel:
    """Gives the model of a folder's config.json, or of a config, on the meta device: no weights are read, none is held.

    It is the caller's own: adapters may be put on it. Raises UserError for a folder without a config of which transformers can build
    a causal language model.
    """
    config = source if isinstance(source, PretrainedConfig) else _read(source)
    return copy.deepcopy(_built(config.to_json_string(use_diff=False)))


def _read(folder: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"base model {str(folder)!r} has no config that can be read: {error}") from error
    return config


@functools.lru_cache(maxsize=4)
def _built(text: str) -> PreTrainedModel:
    """Kept by the config's text, not its folder: files of that name may be other ones tomorrow."""
    values = json.loads(text)
    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError) as error:
        why = str(error).partition("\n")[0]  # a list of all that transformers knows comes behind it
        raise UserError(
            f"a base of type {values['model_type']!r}: no causal language model can be built of its config ({why})"
        ) from error
    return model.requires_grad_(False).eval()
