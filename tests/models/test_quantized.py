"""Quantised bases: what is asked of transformers, where it is refused, and what they do beneath an adapter."""

import logging

import pytest
import torch
from helpers_eval import byte_tokenizer, tiny_llama
from helpers_models import drawn, load, model_config, some_logits
from transformers import LlamaConfig, LlamaForCausalLM

from fedunlearn.errors import UserError
from fedunlearn.models import quantized
from fedunlearn.models.adapter_files import save_adapter
from fedunlearn.models.adapter_tensors import live_parameters
from fedunlearn.models.base import load_base
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.lora import check_trainable, hold_reference, reference_active
from fedunlearn.models.resident import check_probe, numbers_name, release, take_probe
from fedunlearn.models.sidecar import put_sidecar

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TORCHAO, BITSANDBYTES = ["torchao_int8", "torchao_int4"], ["nf4", "fp4", "int8"]
ERROR = {"torchao_int8": 0.05, "torchao_int4": 0.6, "int8": 0.1, "nf4": 0.6, "fp4": 0.8}
"""Relative error of logits that each may have on a random model whose weights are large."""


def args(folder, **changed):
    return model_config(folder, **changed).model_args


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A base wide enough for 4-bit kernels: hidden 128, biases nowhere, head apart."""
    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=266,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=265,
        initializer_range=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class TestRefused:
    @pytest.mark.parametrize("name", BITSANDBYTES)
    def test_bitsandbytes_without_cuda(self, base_folder, name, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(
            UserError,
            match=rf"model\.model_args\.quantization={name} needs a CUDA device, and the base is on the cpu: choose torchao_int8",
        ):
            load_base(base_folder, args(base_folder, quantization=name, device="auto"))

    @pytest.mark.parametrize("name", BITSANDBYTES)
    def test_bitsandbytes_on_a_named_cpu_is_told_before_anything_is_loaded(self, base_folder, name):
        with pytest.raises(UserError, match=rf"quantization={name} needs CUDA, and model\.model_args\.device=cpu"):
            args(base_folder, quantization=name)

    @pytest.mark.parametrize(("name", "package"), [("torchao_int4", "torchao"), ("nf4", "bitsandbytes")])
    def test_a_package_that_is_missing(self, base_folder, name, package, monkeypatch):
        monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
        chosen = args(base_folder, quantization=name, device="auto")
        with pytest.raises(UserError, match=rf"needs the package {package}.*pip install 'fedunlearn\[{package}\]'"):
            quantized.quantization_config(chosen, CUDA)

    @pytest.mark.parametrize("initial", ["pissa", "pissa_niter_4", "olora"])
    def test_beside_an_initialisation_that_decomposes_the_weights(self, base_folder, initial):
        with pytest.raises(
            UserError, match=rf"quantization=torchao_int8 beside lora_config\.init_lora_weights='{initial}'"
        ):
            args(base_folder, quantization="torchao_int8", lora={"init_lora_weights": initial})
        assert args(base_folder, lora={"init_lora_weights": initial}).quantization is None

    def test_beside_biases_of_b(self, base_folder):
        with pytest.raises(UserError, match="lora_bias=true: PEFT has none over torchao's layers"):
            args(base_folder, quantization="torchao_int8", lora={"lora_bias": True})


class TestAskedOf:
    def test_null_asks_for_nothing(self, base_folder):
        assert quantized.quantization_config(args(base_folder), CPU) is None

    @pytest.mark.parametrize("name", ["nf4", "fp4"])
    def test_four_bits_of_bitsandbytes(self, base_folder, name, monkeypatch):
        """Double quantisation, and arithmetic in torch_dtype."""
        monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: object())
        monkeypatch.setattr("transformers.utils.quantization_config.BitsAndBytesConfig.post_init", lambda self: None)
        wanted = args(base_folder, quantization=name, device="auto", torch_dtype="bfloat16")
        found = quantized.quantization_config(wanted, CUDA)
        assert (found.load_in_4bit, found.load_in_8bit) == (True, False)
        assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == (name, True)
        assert found.bnb_4bit_compute_dtype == torch.bfloat16


def losses_of(made, steps=12):
    """Losses of some steps of SGD on one batch, through the adapter alone."""
    ids, live = torch.arange(24, device=made.device).reshape(2, 12) + 40, live_parameters(made.model)
    optimizer, told = torch.optim.AdamW(live.values(), lr=5e-2), []
    for _ in range(steps):
        loss = made.model(input_ids=ids, labels=ids).loss
        loss.backward()
        told.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return told


def _loaded(folder, name, dtype, device):
    release()
    return load(model_config(folder, quantization=name, torch_dtype=dtype, device=device))


def holds(folder, name, dtype, device):
    """Everything that a quantised base promises."""
    plain = _loaded(folder, None, dtype, device)
    wanted, ids = some_logits(plain.model.to("cpu")), plain.fingerprint
    first = numbers_name(plain, plain.start.weights, False)
    made = _loaded(folder, name, dtype, device)
    with torch.no_grad():
        found = made.model(input_ids=(torch.arange(12).reshape(2, 6) + 40).to(made.device)).logits.cpu()
    error = (found.float() - wanted.float()).norm() / wanted.float().norm()
    assert 1e-4 < error < ERROR[name], "it is quantised, and still the same model"
    assert made.fingerprint == ids == fingerprint_base(folder), "the fingerprint is that of the stored tensors"
    assert made.quantization == name
    assert numbers_name(made, made.start.weights, False) != first
    check_trainable(made.model)
    assert {p.dtype for p in live_parameters(made.model).values()} == {torch.float32}
    base = made.model.get_base_model()
    for kept in (base.lm_head.weight, base.model.norm.weight, base.model.embed_tokens.weight):
        assert (type(kept), kept.dtype) == (torch.nn.Parameter, getattr(torch, dtype))
    told = losses_of(made)
    assert told[-1] < 0.8 * told[0]
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TORCHAO)
def test_torchao_on_the_cpu(wide_folder, name, dtype):
    pytest.importorskip("torchao")
    made = holds(wide_folder, name, dtype, "cpu")
    assert type(made.model.get_base_model().model.layers[0].self_attn.q_proj).__name__ == "TorchaoLoraLinear"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*BITSANDBYTES, *TORCHAO])
def test_on_cuda(wide_folder, name, dtype):
    pytest.importorskip("torchao" if name in TORCHAO else "bitsandbytes")
    made = holds(wide_folder, name, dtype, "cuda")
    weight = made.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert name in TORCHAO or weight.dtype in (torch.uint8, torch.int8)


@pytest.mark.parametrize("name", TORCHAO)
def test_a_reference_a_side_car_and_checkpointing_stand_on_it(wide_folder, name):
    pytest.importorskip("torchao")
    made = _loaded(wide_folder, name, "bfloat16", "cpu")
    before = some_logits(made.model)
    made.put(drawn(made.take()))
    moved = some_logits(made.model)
    hold_reference(made.model, made.start.weights)
    with reference_active(made.model):
        assert torch.equal(some_logits(made.model), before)
    assert torch.equal(some_logits(made.model), moved)
    put_sidecar(made.model, drawn(made.start, 3).tensors, "default")
    assert not torch.equal(some_logits(made.model), moved)
    base = made.model.get_base_model()
    assert base.supports_gradient_checkpointing
    base.activation_checkpointing_enable({"use_reentrant": False})
    made.model.train()
    made.model(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in live_parameters(made.model).values())


def test_a_group_that_does_not_divide_a_layer_is_told(tmp_path):
    """Groups are of 32 inputs; a layer of 48 cannot be dealt into them."""
    pytest.importorskip("torchao")
    config = tiny_llama().config
    config.hidden_size, config.intermediate_size = 48, 96
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"base model .* cannot be loaded"):
        load_base(tmp_path, args(tmp_path, quantization="torchao_int4"))


def test_an_adapter_trained_on_another_quantisation_is_loaded_with_a_warning(base_folder, tmp_path, caplog):
    """Its recorded logits are another model's by nature; with the same one they are compared as ever."""
    release()
    made = load(model_config(base_folder))
    made.put(drawn(made.take()))
    probe = take_probe(made)
    over = type(probe)(dtype=f"{probe.dtype} over nf4", logits=tuple(tuple(2 * x for x in row) for row in probe.logits))
    save_adapter(tmp_path / "adapter", made.take(), over)
    release()
    with caplog.at_level(logging.WARNING):
        load(
            model_config(
                tmp_path / "adapter",
                pretrained_model_name_or_path=str(base_folder),
                lora_model_path=str(tmp_path / "adapter"),
            )
        )
    assert [r.message for r in caplog.records if "not compared" in r.message] == [
        f"adapter {tmp_path / 'adapter'}: its logits were recorded in torch.float32 over nf4, this model has torch.float32: the two are not compared"
    ]
    with pytest.raises(UserError, match="does not give the logits recorded with it"):
        check_probe(over, type(probe)(dtype=over.dtype, logits=probe.logits), "it")
