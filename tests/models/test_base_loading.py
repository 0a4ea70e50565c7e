"""The base by itself: frozen, in eval mode, on the device asked for; what cannot be had is told."""

import json
import logging

import pytest
import torch
from helpers_models import copy_of, model_config
from transformers import LlamaForCausalLM

from fedunlearn.errors import UserError
from fedunlearn.models.base import choose_attention, choose_device, load_base, load_tokenizer


def args(folder, **changed):
    return model_config(folder, **changed).model_args


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_it_is_frozen_in_eval_mode_and_of_the_dtype_asked_for(base_folder, dtype, attention):
    model = load_base(base_folder, args(base_folder, torch_dtype=dtype, attn_implementation=attention))
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == attention


def test_what_is_no_model_is_told(tmp_path):
    with pytest.raises(UserError, match=r"base model .* cannot be loaded"):
        load_base(tmp_path, args(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"base model .* cannot be loaded"):
        load_base(tmp_path, args(tmp_path))


def test_a_model_without_weights_is_told(base_folder, tmp_path):
    folder = copy_of(base_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"base model .* cannot be loaded"):
        load_base(folder, args(folder))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_model_that_is_stored_quantised_is_told(base_folder, tmp_path, method):
    folder = copy_of(base_folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    with pytest.raises(
        UserError, match=rf"is stored quantised .*, {method}\): name the model it was quantised from"
    ) as caught:
        load_base(folder, args(folder))
    assert len(caught.value.faults) == 1


def test_a_tokenizer_that_is_missing_is_told(base_folder, tmp_path):
    assert len(load_tokenizer(base_folder)) == 266
    with pytest.raises(
        UserError, match=r"(?s)tokenizer .* cannot be loaded.*model\.tokenizer_args\.pretrained_model_name_or_path"
    ):
        load_tokenizer(tmp_path)


def test_devices(base_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(args(base_folder, device="auto")) == torch.device("cpu")
    with pytest.raises(
        UserError, match=r"model\.model_args\.device='cuda', but no CUDA device is here: use auto or cpu"
    ):
        choose_device(args(base_folder, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(args(base_folder, device="auto")) == torch.device("cuda")
    assert choose_device(args(base_folder, device="cpu")) == torch.device("cpu")


def test_flash_attention_falls_back_with_one_warning_a_process(base_folder, caplog):
    choose_attention.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model = load_base(base_folder, args(base_folder, attn_implementation="flash_attention_2"))
    assert model.config._attn_implementation == "sdpa"
    assert [record.message for record in caplog.records if "flash_attention_2" in record.message] == [
        "model.model_args.attn_implementation=flash_attention_2 is not to be had here (needs CUDA, 16-bit weights and flash-attn): sdpa is used"
    ]


@pytest.mark.parametrize("wanted", ["eager", "sdpa"])
def test_other_attention_is_what_was_asked_for(wanted, caplog):
    assert choose_attention(wanted, "cpu", "float32") == choose_attention(wanted, "cuda", "bfloat16") == wanted
    assert not caplog.records
