"""A base whose linear layers are held in 8 or 4 bits: how transformers is asked for one, and where it cannot be had."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from fedunlearn.config.model import BITSANDBYTES, ModelArgs, Quantization
from fedunlearn.errors import UserError
from fedunlearn.files import read_object

INT4_GROUP = 32


def stored_as(folder: Path) -> str | None:
    """Gives the method that a base's own folder is stored quantised by; None where it is whole. Raises OSError or ValueError for a config.json that cannot be read."""
    stored = read_object(folder / "config.json").get("quantization_config")
    if not stored:
        return None
    return str(stored.get("quant_method", "unknown") if isinstance(stored, dict) else stored)


def quantization_config(args: ModelArgs, device: torch.device) -> BitsAndBytesConfig | TorchAoConfig | None:
    """Gives transformers' config of model.model_args.quantization; None where nothing is to be quantised.

    Embeddings, norms and the head keep torch_dtype: what PEFT's prepare_model_for_kbit_training would do beyond freezing (all of these in float32) takes back a part of the memory and
    changes the base's numbers, and adapters are float32 without it. nf4, fp4: scales are quantised once more (double quantisation), arithmetic
    is in torch_dtype. torchao_int4: groups of 32 inputs share a scale; a weight still takes one byte in memory, for the packed forms have no
    gradient or no LoRA layer in PEFT. Raises UserError where device or package is missing.
    """
    if args.quantization is None:
        return None
    _check_able(args.quantization, device)
    if args.quantization in BITSANDBYTES:
        return _bitsandbytes(args.quantization, getattr(torch, args.torch_dtype))
    return _torchao(args.quantization)


def _check_able(quantization: Quantization, device: torch.device) -> None:
    said, theirs = f"model.model_args.quantization={quantization}", quantization in BITSANDBYTES
    package = "bitsandbytes" if theirs else "torchao"
    faults = []
    if theirs and device.type != "cuda":
        faults.append(
            f"{said} needs a CUDA device, and the base is on the {device.type}: choose torchao_int8, which runs on any device, or null"
        )
    elif importlib.util.find_spec(package) is None:
        faults.append(
            f"{said} needs the package {package}, which is not installed: pip install 'fedunlearn[{package}]', or set it to null"
        )
    if faults:
        raise UserError(*faults)


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _torchao(quantization: Quantization) -> TorchAoConfig:
    kinds: Any = importlib.import_module("torchao.quantization")
    if quantization == "torchao_int8":
        return TorchAoConfig(kinds.Int8WeightOnlyConfig())
    four_bits = torch.int4  # type: ignore[attr-defined]  # torch's stubs do not list it
    return TorchAoConfig(
        kinds.IntxWeightOnlyConfig(weight_dtype=four_bits, granularity=kinds.granularity.PerGroup(INT4_GROUP))
    )
