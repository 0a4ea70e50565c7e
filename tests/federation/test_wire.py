"""What crosses the wire: sizes, round trips, refusals, and whatever a client may send instead of a reply."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from helpers_runs import finetune, history, tiny
from helpers_turns import A, B, Federation, good, good_reply, start, tensors_of, with_trainer

from fedunlearn.federation.checkpoint import latest_checkpoint
from fedunlearn.federation.collect import collect
from fedunlearn.federation.spool import Spool
from fedunlearn.federation.wire import (
    ADAPTER,
    LONGEST_LINE,
    LONGEST_LIST,
    LONGEST_RECORD,
    REPLY,
    REQUEST,
    TrainReply,
    TrainRequest,
    WireError,
    blob_of,
    content_bytes,
    pack_adapter,
    pack_blob,
    pack_scalars,
    typed_record,
    unpack_scalars,
)
from fedunlearn.records.rounds import Trained

NAN, INF = float("nan"), float("inf")
REQUEST_OF_ROUND_3 = TrainRequest(
    run_id="abc", round=3, client_id=1, role="unlearn", epochs=2.0, rounds=4, part=1, parts=2, lr_scale=0.5, seed=2**62 + 1, mu=0.01, trained="b", memory={"lam": 0.5}, radius=0.0,
    adapter=("a" * 64, "b" * 64), sidecar=("c" * 64,), reference=(), reference_sidecar=(), keep=("c" * 64,),
)  # fmt: skip


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
    tensors = {"x.lora_A.weight": torch.randn(3, 5).to(dtype), "x.lora_B.weight": torch.randn(7, 3).to(dtype)}
    back = safetensors.torch.load(blob_of(pack_adapter(tensors)))
    assert back.keys() == tensors.keys()
    assert all(back[name].dtype == dtype and torch.equal(back[name], tensors[name]) for name in tensors)


def test_scalars_come_back_with_their_types():
    back = unpack_scalars(TrainRequest, pack_scalars(REQUEST_OF_ROUND_3))
    assert back == REQUEST_OF_ROUND_3
    assert back.seed == 2**62 + 1
    assert isinstance(back.epochs, float)
    assert back.adapter == ("a" * 64, "b" * 64)
    assert (back.task.mu, back.task.trained) == (0.01, Trained.B)


@pytest.mark.parametrize(
    ("text", "reason", "message"),
    [
        ('{"run_id": "x"}', "unreadable", "TrainReply lacks 'base_fingerprint'"),
        ("[1, 2]", "unreadable", "TrainReply is no JSON object"),
        ("not json", "unreadable", r"TrainReply is no JSON \(JSONDecodeError\)"),
        ("", "unreadable", "TrainReply is no JSON"),
        (7, "unreadable", "no TrainReply in the message"),
        (b"{}", "unreadable", "no TrainReply in the message"),
    ],
)
def test_a_reply_that_is_none_is_refused(text, reason, message):
    with pytest.raises(WireError, match=message) as caught:
        unpack_scalars(TrainReply, ConfigRecord({"json": text}))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_examples", 1.5, "num_examples"),
        ("num_examples", True, "num_examples"),
        ("num_trained", None, "num_examples"),
        ("num_steps", "3", "unreadable"),
        ("seconds", "1", "unreadable"),
        ("seconds", True, "unreadable"),
        ("loss_trace", [1, "a"], "unreadable"),
        ("loss_trace", 1.0, "unreadable"),
        ("missing", [1], "unreadable"),
        ("missing", "abc", "unreadable"),
        ("run_id", "x" * 257, "unreadable"),
        ("run_id", "two\nlines", "unreadable"),
        ("run_id", "\ud800", "unreadable"),
    ],
)
def test_a_reply_with_a_value_of_another_type_is_refused(key, value, reason):
    text = json.dumps({**asdict(good_reply(REQUEST_OF_ROUND_3)), key: value})
    with pytest.raises(WireError, match=rf"TrainReply\.{key}") as caught:
        unpack_scalars(TrainReply, ConfigRecord({"json": text}))
    assert caught.value.reason == reason


def test_another_array_than_the_blob_is_refused():
    with pytest.raises(WireError, match="no packed adapter"):
        blob_of(ArrayRecord([np.zeros(3)]))
    with pytest.raises(WireError, match="ConfigRecord where ArrayRecord"):
        typed_record(ArrayRecord, ConfigRecord({"a": 1}))
    with pytest.raises(WireError, match="NoneType where ArrayRecord"):
        typed_record(ArrayRecord, None)


# --- hostile replies, through the server's own turn


@pytest.fixture(scope="module")
def run(pocket):
    """A fine-tuning run of three clients that goes on with two, and asks nobody twice."""
    made = tiny(pocket, Path("saves"), "finetune", "x").run
    return with_trainer(made, num_clients=3, min_clients=2, max_retries=0)


def outcome_of(run, folder, answer, **call):
    """What the server makes of client 1's answer; the round must go on with the others, whatever it is."""
    federation = Federation(run, folder, 3, {1: answer})
    with federation.spool() as spool:
        collected = collect(replace(federation.call, **call), 1, {}, spool)
    assert [update.client_id for update in collected.report.updates if update.client_id != 1] == [0, 2]
    (outcome,) = [outcome for outcome in collected.report.outcomes if outcome.client_id == 1]
    assert (1 in {update.client_id for update in collected.report.updates}) == (outcome.reason == "")
    json.dumps(asdict(outcome), allow_nan=False).encode()  # as a line of history wants it
    return outcome


def saying(text):
    """An answer with this text where the scalars are awaited."""
    return lambda request: RecordDict({**good(request), REPLY: ConfigRecord({"json": text})})


def with_fields(**changes):
    """An answer with some scalars changed; a text is put in as JSON as it is."""

    def answer(request):
        text = json.dumps({**asdict(good_reply(request)), **dict.fromkeys(changes, "@")})
        for value in changes.values():
            text = (
                text.replace('"@"', value, 1) if isinstance(value, str) else text.replace('"@"', json.dumps(value), 1)
            )
        return RecordDict({**good(request), REPLY: ConfigRecord({"json": text})})

    return answer


def with_records(**records):
    """An answer with other records, or none where it says None."""
    return lambda request: RecordDict({k: v for k, v in {**good(request), **records}.items() if v is not None})


def with_blob(blob):
    return with_records(adapter=pack_blob(blob))


def with_tensors(**changes):
    """An answer whose adapter has other tensors; None leaves one out."""
    tensors = {A: start()[A], B: start()[B] + 0.1, **{{"a": A, "b": B}.get(k, k): v for k, v in changes.items()}}
    return with_records(adapter=pack_adapter({name: t for name, t in tensors.items() if t is not None}))


def dies(request):
    raise MemoryError("no memory left \x1b[31m\nand a traceback")


BIG = "9" * 400
HEADER_OF_LIES = b'{"x":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}'
HOSTILE = [
    ("unreadable", saying("[" * LONGEST_RECORD)),
    ("unreadable", saying('{"a":' * 160_000)),
    ("unreadable", saying("\0" * 9)),
    ("unreadable", saying("NaN")),
    ("unreadable", saying(BIG)),
    ("unreadable", saying('{"round": ' + "9" * 5000 + "}")),  # more digits than Python converts
    ("wire_size", saying(" " * (LONGEST_RECORD + 1))),
    ("unreadable", with_fields(round=BIG)),
    ("unreadable", with_fields(client_id=BIG)),
    ("unreadable", with_fields(round=str(2**63))),
    ("stale_round", with_fields(round=str(2**63 - 1))),
    ("num_examples", with_fields(num_examples=str(2**63 - 1))),
    ("stale_round", with_fields(client_id="-1")),
    ("num_examples", with_fields(num_examples=BIG)),
    ("num_examples", with_fields(num_examples="-" + BIG)),
    ("num_examples", with_fields(num_examples="NaN")),
    ("num_examples", with_fields(num_examples="20.0")),
    ("num_examples", with_fields(num_trained=BIG)),
    ("num_examples", with_fields(num_trained="Infinity")),
    ("unreadable", with_fields(num_steps=BIG)),
    ("unreadable", with_fields(num_tokens=BIG)),
    ("unreadable", with_fields(num_tokens="-1")),
    ("unreadable", with_fields(seconds=BIG)),
    ("unreadable", with_fields(seconds="NaN")),
    ("unreadable", with_fields(seconds="-0.1")),
    ("unreadable", with_fields(seconds="1e999")),
    ("unreadable", with_fields(loss=BIG)),
    ("unreadable", with_fields(loss='"low"')),
    ("unreadable", with_fields(loss_trace=f"[{BIG}]")),
    ("unreadable", with_fields(run_id="NaN")),
    ("unreadable", with_fields(run_id='"\\ud800"')),
    ("stale_round", with_fields(run_id='"another"')),
    ("base_mismatch", with_fields(base_fingerprint='"another"')),
    ("wire_size", with_fields(loss_trace=[1] * 200_000)),
    ("wire_size", with_fields(missing=["a"] * 200_000)),
    ("missing_part", with_fields(missing=["a"])),  # for ever: asked twice a turn
    ("extra_metric", with_fields(extra="1")),
    ("extra_metric", with_fields(**{"\ud800" * 9: "[[[]]]"})),
    ("extra_metric", with_records(reply=ConfigRecord({"json": "{}", "more": 1}))),
    ("extra_metric", with_records(metrics=MetricRecord({"num-examples": 10**12}))),
    ("extra_metric", with_records(another=pack_adapter(start()))),
    ("extra_metric", with_records(**{"x" * 10**6: ConfigRecord()})),
    ("unreadable", with_records(reply=None)),
    ("unreadable", with_records(reply=MetricRecord({"json": 1}))),
    ("unreadable", with_records(reply=ConfigRecord({"json": 1}))),
    ("unreadable", with_records(adapter=None)),
    ("unreadable", with_records(adapter=ConfigRecord({"blob": b""}))),
    ("unreadable", with_records(adapter=ArrayRecord())),
    ("unreadable", with_records(adapter=ArrayRecord([np.zeros(3)]))),
    ("unreadable", with_records(adapter=ArrayRecord({"blob": Array("uint8", (1,), "numpy.ndarray", b"\x80")}))),
    ("unreadable", with_blob(b"")),
    ("unreadable", with_blob(b"\x80\x04\x95")),  # a pickle's beginning
    ("unreadable", with_blob(b"\xff" * 64)),  # a header of 2**64 - 1 bytes
    ("unreadable", with_blob(len(HEADER_OF_LIES).to_bytes(8, "little") + HEADER_OF_LIES + b"\0" * 4)),
    ("unreadable", with_blob(safetensors.torch.save(start())[:-1])),
    ("wire_size", with_blob(b"\0" * 10**6)),
    ("wire_size", with_tensors(b=torch.zeros(4, 10**6))),
    ("shape", with_tensors(b=torch.zeros(1, 4, 2))),
    ("shape", with_tensors(b=torch.zeros(0, 2))),
    ("dtype", with_tensors(b=start()[B].double())),
    ("dtype", with_tensors(b=start()[B].bfloat16())),
    ("nan", with_tensors(b=torch.full((4, 2), NAN))),
    ("nan", with_tensors(a=torch.full((2, 3), -INF))),
    ("norm", with_tensors(a=torch.full((2, 3), 3e38))),
    ("missing_key", with_tensors(b=None)),
    ("extra_key", with_tensors(c=torch.ones(1))),
    ("extra_key", with_tensors(**{"x" * 9000: torch.ones(1)})),
    ("crashed", dies),
    ("unreadable", lambda request: RecordDict()),
]


@pytest.mark.parametrize(("reason", "answer"), HOSTILE)
def test_whatever_a_client_sends_costs_it_its_own_update_and_has_a_reason(run, tmp_path, reason, answer):
    outcome = outcome_of(run, tmp_path, answer)
    assert outcome.reason == reason
    assert outcome.detail
    assert len(outcome.detail) <= LONGEST_LINE
    assert outcome.detail.isprintable()
    assert outcome.weight == 0.0


@pytest.mark.parametrize(
    ("answer", "loss", "trace"),
    [
        (with_fields(loss="NaN"), None, (1.0,)),
        (with_fields(loss="1e308"), None, (1.0,)),
        (with_fields(loss="-2", loss_trace="[Infinity, 3]"), -2.0, (3.0,)),
        (with_fields(loss_trace=[0] * LONGEST_LIST), 1.0, (0.0,) * LONGEST_LIST),
    ],
)
def test_a_loss_that_is_no_number_is_left_out_and_the_update_counts(run, tmp_path, answer, loss, trace):
    outcome = outcome_of(run, tmp_path, answer)
    assert (outcome.reason, outcome.loss, outcome.loss_trace) == ("", loss, trace)


@pytest.mark.parametrize(
    ("loss", "code", "told"),
    [
        ("NaN", "nan", None),
        ("-Infinity", "nan", None),
        ("1e300", "loss", None),
        ("-7", "loss", -7),
        ("10001", "loss", 10001),
    ],
)
def test_a_loss_that_cannot_be_right_spoils_the_update_where_the_server_averages_by_losses(
    run, tmp_path, loss, code, told
):
    outcome = outcome_of(run, tmp_path, with_fields(loss=loss), reads_losses=True)
    assert (outcome.reason, outcome.loss) == (code, told)
    assert "a training loss of" in outcome.detail
    assert outcome_of(run, tmp_path, with_fields(loss=loss)).reason == ""
    assert outcome_of(run, tmp_path, with_fields(loss="7"), reads_losses=True).reason == ""


def test_a_blob_is_read_up_to_the_limit_that_the_gate_sets(run, tmp_path):
    """14 float32 entries are awaited, 56 bytes; 1.5 times that, 512 bytes a tensor and 64 KiB of header are read."""
    limit = int(1.5 * 14 * 4) + 2 * 512 + 65_536
    at, above = (
        outcome_of(run, tmp_path, with_blob(b"\0" * limit)),
        outcome_of(run, tmp_path, with_blob(b"\0" * (limit + 1))),
    )
    assert (at.reason, above.reason) == ("unreadable", "wire_size")
    assert f"{limit + 1} bytes of adapter, at most {limit} are read (56 awaited)" in above.detail


def test_what_is_spooled_is_laid_out_as_we_write_it_whatever_the_sender_s_header(run, tmp_path):
    """A header of 8 k + 1 bytes is sound, and with the file mapped puts every float32 between two places of memory."""
    sent = {A: start()[A], B: start()[B] + 0.1}
    blob = safetensors.torch.save(sent, {"of": "the sender"})
    size = int.from_bytes(blob[:8], "little")
    odd = (size + 1).to_bytes(8, "little") + blob[8 : 8 + size] + b" " + blob[8 + size :]
    federation = Federation(run, tmp_path, 3, {1: with_blob(odd)})
    with federation.spool() as spool:
        collected = collect(federation.call, 1, {}, spool)
        assert 1 in {update.client_id for update in collected.report.updates}
        assert (tmp_path / "rounds/.spool/1.safetensors").read_bytes() == safetensors.torch.save(sent)
        with spool.reader([1]) as read:
            assert all(torch.equal(read(1, name), tensor) for name, tensor in sent.items())
            assert all(read(1, name).data_ptr() % 4 == 0 for name in sent)


# --- bfloat16 on the wire


def test_bfloat16_arrives_as_bfloat16_and_is_summed_in_float64(pocket, saves, monkeypatch):
    """The global adapter is the float64 mean of the bfloat16 tensors, cast once: no step between is made in bfloat16 or float32.

    Three clients own 28, 28 and 24 of 80 rows: with shares of no power of two a sum in float32 would differ in the last bit.
    """
    spooled, real = {}, Spool.keep

    def keep(self, client, blob):
        spooled[client] = tensors_of(blob)
        real(self, client, blob)

    monkeypatch.setattr(Spool, "keep", keep)
    one = ("trainer.federated.num_rounds=1", "trainer.federated.num_clients=3")
    run = finetune(pocket, saves, "half", *one, "trainer.federated.wire_dtype=bfloat16")
    assert sorted(spooled) == [0, 1, 2]
    assert {t.dtype for tensors in spooled.values() for t in tensors.values()} == {torch.bfloat16}
    made = latest_checkpoint(run).state.adapter
    for name, tensor in made.items():
        mean = sum(rows / 80 * spooled[client][name].double() for client, rows in enumerate((28, 28, 24)))
        assert torch.equal(tensor, mean.float())
    assert any(not torch.equal(t, t.bfloat16().float()) for t in made.values())  # a mean of halves is no half
    full = finetune(pocket, saves, "full", *one)
    halves, wholes = history(run)[0]["clients"], history(full)[0]["clients"]
    tensors = sum(t.numel() for t in made.values())
    for key in ("bytes_down", "bytes_up"):
        saved = [whole[key] - half[key] for half, whole in zip(halves, wholes, strict=True)]
        assert all(
            abs(n - 2 * tensors) < 300 for n in saved
        )  # 2 bytes an entry; lengths in the header have fewer digits
