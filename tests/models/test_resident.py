"""The one model of a process: never two bases, the right adapter in place, and a proof that catches what fits but is another."""

import dataclasses
import gc
import json
import logging
import math
import weakref

import pytest
import torch
from helpers_eval import byte_tokenizer, tiny_llama
from helpers_models import TAKE_ALL, copy_of, drawn, load, model_config, some_logits
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import CONFIG, PROOF, load_adapter, save_adapter
from fedunlearn.models.adapter_tensors import read_tensors
from fedunlearn.models.lora import check_trainable
from fedunlearn.models.resident import check_probe, release, take_probe
from fedunlearn.records.adapter import Adapter


def alive():
    """Bases and their embedding weights in this process, by what the garbage collector sees."""
    gc.collect()
    things = gc.get_objects()
    bases = {id(thing) for thing in things if type(thing) is LlamaForCausalLM}
    weights = {id(thing) for thing in things if type(thing) is nn.Parameter and thing.shape == (266, 32)}
    return bases, weights


@pytest.fixture
def other_folder(tmp_path):
    """Another base of the same architecture."""
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def second_adapter(adapter_folder, place):
    """The same run's adapter with other values."""
    made = load(model_config(adapter_folder, TAKE_ALL))
    made.put(drawn(made.take(), seed=2))
    save_adapter(place / "second", made.take(), take_probe(made))
    return place / "second"


class TestOneBase:
    def test_another_adapter_loads_no_second_base(self, adapter_folder, tmp_path):
        second = second_adapter(adapter_folder, tmp_path)
        release()
        before = alive()
        first = load(model_config(adapter_folder, TAKE_ALL))
        held = alive()
        other = load(model_config(second, TAKE_ALL))
        assert other.model is first.model
        assert alive() == held
        assert (len(held[0] - before[0]), len(held[1] - before[1])) == (1, 2), "one base: its embedding and its head"
        assert read_tensors(other.model).keys() == load_adapter(second)[0].tensors.keys()
        assert other.take() == load_adapter(second)[0]

    def test_a_fresh_adapter_after_a_loaded_one_uses_the_same_base(self, adapter_folder, base_folder):
        loaded = load(model_config(adapter_folder, TAKE_ALL))
        fresh = load(model_config(base_folder))
        assert fresh.model is loaded.model
        assert not any(t.any() for name, t in fresh.take().tensors.items() if "lora_B" in name)

    def test_another_base_takes_the_place_of_the_old_one(self, base_folder, other_folder):
        gone = weakref.ref(load(model_config(base_folder)).model)
        load(model_config(other_folder))
        gc.collect()
        assert gone() is None

    def test_another_rank_loads_the_base_anew_and_lets_the_old_one_go(self, base_folder):
        gone = weakref.ref(load(model_config(base_folder)).model)
        assert {
            t.shape[0] for n, t in load(model_config(base_folder, {"r": 2})).take().tensors.items() if "lora_A" in n
        } == {2}
        gc.collect()
        assert gone() is None

    def test_released_it_goes(self, base_folder):
        gone = weakref.ref(load(model_config(base_folder)).model)
        release()
        assert gone() is None


class TestStart:
    def test_a_fresh_start_comes_from_the_seed_alone(self, base_folder):
        torch.manual_seed(5)
        first = load(model_config(base_folder), seed=3).start
        release()
        state = torch.get_rng_state()
        again, other = load(model_config(base_folder), seed=3).start, load(model_config(base_folder), seed=4).start
        assert torch.equal(torch.get_rng_state(), state)
        assert first == again
        assert first.tensor_hash != other.tensor_hash

    def test_a_loaded_adapter_is_trainable(self, adapter_folder):
        made = load(model_config(adapter_folder, TAKE_ALL))
        check_trainable(made.model)
        assert made.start == load_adapter(adapter_folder)[0]

    def test_the_model_is_in_eval_mode_and_dropout_off(self, adapter_folder):
        release()
        made = load(model_config(adapter_folder, {**TAKE_ALL, "lora_dropout": 0.5}))
        assert torch.equal(some_logits(made.model), some_logits(made.model))
        assert not any(module.training for module in made.model.modules())

    def test_lora_model_path_names_the_adapter_beside_its_base(self, adapter_folder, base_folder):
        made = load(model_config(base_folder, TAKE_ALL, lora_model_path=str(adapter_folder)))
        assert made.start == load_adapter(adapter_folder)[0]

    def test_what_is_saved_and_loaded_gives_the_same_bits(self, base_folder, tmp_path):
        made = load(model_config(base_folder))
        made.put(drawn(made.take(), seed=6))
        before = some_logits(made.model)
        save_adapter(tmp_path / "a", made.take(), take_probe(made))
        release()
        assert torch.equal(some_logits(load(model_config(tmp_path / "a", TAKE_ALL)).model), before)

    def test_the_start_is_a_copy(self, base_folder):
        made = load(model_config(base_folder))
        before = made.start.tensor_hash
        made.put(drawn(made.take(), seed=6))
        assert made.start.tensor_hash == before != made.take().tensor_hash

    def test_a_bfloat16_base_keeps_a_float32_adapter(self, adapter_folder):
        made = load(model_config(adapter_folder, TAKE_ALL, torch_dtype="bfloat16"))
        assert made.model.get_base_model().dtype == torch.bfloat16
        assert made.take() == load_adapter(adapter_folder)[0]
        check_trainable(made.model)

    def test_this_run_s_dropout_is_used_with_a_loaded_adapter(self, adapter_folder):
        made = load(model_config(adapter_folder, {**TAKE_ALL, "lora_dropout": 0.5}))
        assert made.start.peft_config["lora_dropout"] == 0.5
        assert {m.p for m in made.model.modules() if isinstance(m, nn.Dropout)} == {0.5}

    def test_without_lora_there_is_the_base_alone(self, base_folder):
        made = load(model_config(base_folder, use_lora=False, lora_config=None))
        assert made.start is None
        assert torch.equal(some_logits(made.model), some_logits(tiny_llama().eval()))
        assert not any(p.requires_grad for p in made.model.parameters())
        with pytest.raises(ValueError, match="a base without LoRA has no adapter"):
            made.take()

    def test_an_evaluation_without_lora_after_a_run_does_not_see_its_adapter(self, adapter_folder, base_folder):
        load(model_config(adapter_folder, TAKE_ALL))
        bare = load(model_config(base_folder, use_lora=False, lora_config=None))
        assert torch.equal(some_logits(bare.model), some_logits(tiny_llama().eval()))


class TestPut:
    def test_an_adapter_of_another_base_is_refused(self, base_folder):
        made = load(model_config(base_folder))
        stranger = dataclasses.replace(made.take(), base_fingerprint="0" * 64)
        with pytest.raises(
            UserError, match=rf"adapter belongs to another base \(fingerprint 0+; this one is {made.fingerprint}\)"
        ):
            made.put(stranger)

    def test_a_foreign_one_is_taken_where_it_fits(self, base_folder):
        made = load(model_config(base_folder))
        foreign = dataclasses.replace(drawn(made.take()), base_fingerprint=None)
        made.put(foreign)
        assert made.take().tensor_hash == foreign.tensor_hash
        assert made.take().base_fingerprint == made.fingerprint
        with pytest.raises(UserError, match="stands on one side only"):
            made.put(Adapter({"x": torch.zeros(1)}, {}, None))


class TestProof:
    def test_another_base_of_the_same_shape_is_refused(self, adapter_folder, other_folder):
        with pytest.raises(
            UserError, match=r"belongs to another base: its fingerprint is .*; name the base it was trained on"
        ):
            load(model_config(other_folder, TAKE_ALL, lora_model_path=str(adapter_folder)))

    def test_another_base_behind_the_adapter_s_own_name_is_refused(self, adapter_folder, other_folder, tmp_path):
        folder = copy_of(adapter_folder, tmp_path)
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": str(other_folder)}))
        with pytest.raises(UserError, match="belongs to another base"):
            load(model_config(folder, TAKE_ALL))

    @pytest.mark.parametrize("changed", [{"lora_alpha": 9.0}, {"use_rslora": True}])
    def test_a_config_that_fits_but_gives_other_logits_is_refused(self, adapter_folder, tmp_path, changed):
        """Tensors and base are the right ones; only the scale alpha / r differs, and the proof is one of an earlier version, which says nothing of the config."""
        folder = copy_of(adapter_folder, tmp_path)
        proof = json.loads((folder / PROOF).read_text())
        del proof["config_hash"]
        (folder / PROOF).write_text(json.dumps(proof))
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changed}))
        with pytest.raises(
            UserError, match=r"does not give the logits recorded with it \(tolerance 1e-05 of the largest\)"
        ):
            load(model_config(folder, TAKE_ALL))

    def test_without_proof_two_things_are_said(self, base_folder, tmp_path, caplog):
        fresh = load(model_config(base_folder)).take()
        save_adapter(tmp_path / "a", fresh)
        (tmp_path / "a" / PROOF).unlink()
        release()
        with caplog.at_level(logging.WARNING):
            load(model_config(tmp_path / "a", TAKE_ALL))
        said = " ".join(record.getMessage() for record in caplog.records)
        assert "every B is zero, so it changes nothing of the base" in said
        assert "carries no proof of ours: its 8 tensors fit in name and shape; whether it was trained on" in said

    def test_a_proven_adapter_is_loaded_in_silence(self, adapter_folder, caplog):
        with caplog.at_level(logging.WARNING):
            load(model_config(adapter_folder, TAKE_ALL))
        assert not [record for record in caplog.records if record.name.startswith("fedunlearn")]


def foreign_folder(base_folder, folder, **variant):
    """What plain PEFT saves of an adapter whose every value was moved."""
    foreign = get_peft_model(
        tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", **variant)
    )
    foreign.peft_config["default"].base_model_name_or_path = str(base_folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in foreign.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    foreign.save_pretrained(folder)
    return foreign.eval()


@pytest.mark.parametrize(
    "variant",
    [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "orthogonal"}],
)
def test_a_foreign_adapter_s_plain_tensors_are_loaded_with_its_factors(base_folder, tmp_path, variant):
    foreign = foreign_folder(base_folder, tmp_path, **variant)
    assert torch.equal(some_logits(load(model_config(tmp_path, TAKE_ALL)).model), some_logits(foreign))


@pytest.mark.parametrize(
    "variant",
    [{"init_lora_weights": "olora"}, {"trainable_token_indices": [1]}, {"layer_replication": [[0, 2], [0, 1]]}],
)
def test_a_foreign_variant_that_is_not_understood_is_refused(base_folder, tmp_path, variant):
    """olora and pissa write into the base's weights, again for the reference."""
    foreign_folder(base_folder, tmp_path, **variant)
    with pytest.raises(UserError, match=f"the adapter's {next(iter(variant))}="):
        load(model_config(tmp_path, TAKE_ALL))


class TestProbe:
    def test_it_is_the_last_position_of_four_fixed_rows(self, base_folder):
        """Ids 7919 k mod 266 for k = 0 .. 63 in rows of 16, columns 104729 k mod 266: here row 1, column 0."""
        made = load(model_config(base_folder))
        ids = torch.tensor([[7919 * k % 266 for k in range(16, 32)]])
        with torch.no_grad():
            wanted = made.model(input_ids=ids).logits[0, -1, 0].item()
        probe = take_probe(made)
        assert probe.dtype == "torch.float32"
        assert (len(probe.logits), len(probe.logits[0])) == (4, 64)
        assert probe.logits[1][0] == pytest.approx(wanted, abs=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    def test_taking_it_leaves_mode_and_random_state(self, base_folder, training):
        made = load(model_config(base_folder, {"lora_dropout": 0.5}))
        made.put(drawn(made.take()))
        made.model.train(training)
        state = torch.get_rng_state()
        assert take_probe(made) == take_probe(made)
        assert made.model.training == training
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_small_move_of_the_adapter_is_seen(self, base_folder):
        made = load(model_config(base_folder))
        made.put(drawn(made.take()))
        before = take_probe(made)
        check_probe(before, take_probe(made), "here")
        made.put(made.take().replace({n: 1.001 * t for n, t in made.take().tensors.items()}))
        with pytest.raises(UserError, match="adapter 'here' does not give the logits recorded with it"):
            check_probe(before, take_probe(made), "here")

    def test_bfloat16_on_either_side_widens_the_tolerance(self, adapter_folder, base_folder):
        saved = load_adapter(adapter_folder)[1]
        narrow = take_probe(load(model_config(adapter_folder, TAKE_ALL, torch_dtype="bfloat16")))
        assert narrow.dtype == "torch.bfloat16"
        check_probe(saved, narrow, "here")
        with pytest.raises(UserError, match=r"tolerance 0\.02 of the largest"):
            check_probe(saved, take_probe(load(model_config(base_folder, torch_dtype="bfloat16"))), "here")

    @pytest.mark.parametrize(("old", "new"), [(((1.0, 2.0),), ((1.0,),)), (((1.0,),), ((1.0,), (2.0,)))])
    def test_a_probe_of_another_size_is_refused(self, adapter_folder, old, new):
        probe = load_adapter(adapter_folder)[1]
        with pytest.raises(UserError, match="does not give the logits recorded"):
            check_probe(dataclasses.replace(probe, logits=old), dataclasses.replace(probe, logits=new), "here")

    def test_nan_logits_do_not_pass(self, adapter_folder):
        saved = load_adapter(adapter_folder)[1]
        broken = dataclasses.replace(saved, logits=((math.nan,) * 64,) * 4)
        with pytest.raises(UserError, match="does not give the logits recorded"):
            check_probe(saved, broken, "here")
