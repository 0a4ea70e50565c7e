"""What crosses the wire: sizes, round trips, and refusals."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedunlearn.federation.wire import (
    ADAPTER,
    REQUEST,
    TrainReply,
    TrainRequest,
    blob_of,
    content_bytes,
    pack_adapter,
    pack_scalars,
    typed_record,
    unpack_scalars,
)

REQUEST_OF_ROUND_3 = TrainRequest(
    run_id="abc", round=3, client_id=1, role="unlearn", epochs=2.0, lr_scale=0.5, seed=2**62 + 1, reference_hash=""
)


def llama_1b_adapter(rank=16):
    """Zeros in the shapes of Llama-3.2-1B's seven projections: 16 layers, hidden 2048, keys and values 512, inner 8192."""
    sides = {
        "self_attn.q_proj": (2048, 2048),
        "self_attn.k_proj": (2048, 512),
        "self_attn.v_proj": (2048, 512),
        "self_attn.o_proj": (2048, 2048),
        "mlp.gate_proj": (2048, 8192),
        "mlp.up_proj": (2048, 8192),
        "mlp.down_proj": (8192, 2048),
    }
    tensors = {}
    for layer in range(16):
        for module, (d_in, d_out) in sides.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.zeros(rank, d_in)
            tensors[f"{name}.lora_B.weight"] = torch.zeros(d_out, rank)
    return tensors


def test_a_1b_shaped_adapter_costs_at_most_one_percent_more_than_its_tensors():
    tensors = llama_1b_adapter()
    content = RecordDict({ADAPTER: pack_adapter(tensors), REQUEST: pack_scalars(REQUEST_OF_ROUND_3)})
    assert content_bytes(content) <= 1.01 * sum(t.numel() * 4 for t in tensors.values())


def test_counted_bytes_are_those_of_the_protobuf_message_but_for_length_fields():
    content = RecordDict({ADAPTER: pack_adapter({"a": torch.randn(50, 40)}), REQUEST: pack_scalars(REQUEST_OF_ROUND_3)})
    assert abs(content_bytes(content) - recorddict_to_proto(content).ByteSize()) <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_comes_back_bit_by_bit(dtype):
    import safetensors.torch

    tensors = {"x.lora_A.weight": torch.randn(3, 5).to(dtype), "x.lora_B.weight": torch.randn(7, 3).to(dtype)}
    back = safetensors.torch.load(blob_of(pack_adapter(tensors)))
    assert back.keys() == tensors.keys()
    assert all(back[name].dtype == dtype and torch.equal(back[name], tensors[name]) for name in tensors)


def test_scalars_come_back_with_their_types():
    back = unpack_scalars(TrainRequest, pack_scalars(REQUEST_OF_ROUND_3))
    assert back == REQUEST_OF_ROUND_3
    assert back.seed == 2**62 + 1
    assert isinstance(back.epochs, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"run_id": "x"}', "TrainReply expected"),
        ("[1, 2]", "TrainReply expected"),
        ("not json", "Expecting value"),
    ],
)
def test_a_reply_that_is_none_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        unpack_scalars(TrainReply, ConfigRecord({"json": text}))


@pytest.mark.parametrize(
    ("key", "value"), [("num_examples", 1.5), ("num_examples", True), ("seconds", "1"), ("loss_trace", [1, "a"])]
)
def test_a_reply_with_a_value_of_another_type_is_refused(key, value):
    import json
    from dataclasses import asdict

    reply = TrainReply(
        run_id="r", round=1, client_id=0, num_examples=3, num_trained=3, num_steps=1, num_tokens=9, seconds=0.1, loss=1.0,
        loss_trace=(1.0,), needs_reference=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match=key):
        unpack_scalars(TrainReply, ConfigRecord({"json": json.dumps({**asdict(reply), key: value})}))


def test_another_array_than_the_blob_is_refused():
    import numpy as np

    with pytest.raises(ValueError, match="no packed adapter"):
        blob_of(ArrayRecord([np.zeros(3)]))
    with pytest.raises(TypeError, match="ConfigRecord where ArrayRecord"):
        typed_record(ArrayRecord, ConfigRecord({"a": 1}))
