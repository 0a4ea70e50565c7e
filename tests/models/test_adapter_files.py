"""Adapter folders: what comes back, what is refused, and that the text is the same in every process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers_models import TAKE_ALL, copy_of, load, lora_args, model_config, some_logits
from peft import PeftModel
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import (
    CONFIG,
    PROOF,
    WEIGHTS,
    Probe,
    load_adapter,
    proves_config,
    read_folder,
    save_adapter,
)
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.models.lora_config import lora_config_of, plain_config
from fedunlearn.records.adapter import Adapter, hash_tensors

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OTHER_PROCESS = """
import json, sys
from fedunlearn.config.lora import LoraArgs
from fedunlearn.models.lora_config import lora_config_of, plain_config
args = LoraArgs(r=4, lora_alpha=8.0, target_modules=tuple(json.loads(sys.argv[1])))
print(json.dumps(plain_config(lora_config_of(args, None, "base")), indent=2, sort_keys=True))
"""


def test_what_is_saved_comes_back(tmp_path):
    probe = Probe(dtype="torch.float32", logits=((1.5, -2.25), (0.1, 3.0)))
    adapter = Adapter({"b": torch.randn(3, 2), "a": torch.randn(2).bfloat16()}, {"r": 2, "list": ["x"]}, "print")
    save_adapter(tmp_path / "adapter", adapter, probe)
    assert read_folder(tmp_path / "adapter") == (adapter, probe)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS, PROOF]


def test_an_adapter_saved_without_probe_has_none(tmp_path):
    save_adapter(tmp_path, Adapter({"a": torch.ones(1)}, {}, None))
    adapter, probe = read_folder(tmp_path)
    assert probe is None
    assert adapter.base_fingerprint is None


def test_saving_twice_replaces_the_folder_byte_by_byte(adapter_folder, tmp_path):
    adapter, probe = load_adapter(adapter_folder)
    for _ in range(2):
        save_adapter(tmp_path / "again", adapter, probe)
    for name in (WEIGHTS, CONFIG, PROOF):
        assert (tmp_path / "again" / name).read_bytes() == (adapter_folder / name).read_bytes()


def test_the_proof_names_tensors_and_base(adapter_folder, base_folder):
    proof = json.loads((adapter_folder / PROOF).read_text())
    assert proof["tensor_hash"] == hash_tensors(load_file(adapter_folder / WEIGHTS))
    assert proof["base_fingerprint"] == fingerprint_base(base_folder)
    assert [len(row) for row in proof["probe"]["logits"]] == [64] * 4


def test_the_config_is_sorted_and_names_the_base(adapter_folder, base_folder):
    config = json.loads((adapter_folder / CONFIG).read_text())
    assert list(config) == sorted(config)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8.0, "LORA")
    assert config["base_model_name_or_path"] == str(base_folder)


def test_another_process_writes_the_same_config(tmp_path):
    """PEFT holds target_modules as a set, whose order differs with PYTHONHASHSEED; ours is sorted, whatever order the yaml has."""
    env = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", OTHER_PROCESS, json.dumps(NAMES[::-1])]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    config = lora_config_of(lora_args(target_modules=NAMES), None, "base")
    save_adapter(tmp_path / "here", Adapter({"a": torch.zeros(1)}, plain_config(config), "print"))
    assert isinstance(config.target_modules, set)
    assert (tmp_path / "here" / CONFIG).read_text() == said.stdout


def test_plain_peft_loads_the_folder_and_gives_the_same_logits(adapter_folder, base_folder):
    made = load(model_config(adapter_folder, TAKE_ALL))
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    bare = some_logits(base)
    theirs = some_logits(PeftModel.from_pretrained(base, adapter_folder).eval())
    assert (theirs - bare).abs().max() > 0.1
    assert torch.allclose(theirs, some_logits(made.model), atol=1e-6)


def test_a_folder_that_plain_peft_wrote_is_foreign(base_folder, tmp_path):
    load(model_config(base_folder)).model.save_pretrained(tmp_path)
    adapter, probe = load_adapter(tmp_path)
    assert adapter.base_fingerprint is None
    assert probe is None
    assert len(adapter.tensors) == 8


class TestDamage:
    @pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
    def test_a_missing_file_is_named(self, adapter_folder, tmp_path, name):
        folder = copy_of(adapter_folder, tmp_path)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"lacks {name}: name a complete PEFT folder"):
            load_adapter(folder)

    def test_without_its_proof_a_folder_of_ours_is_foreign(self, adapter_folder, tmp_path):
        folder = copy_of(adapter_folder, tmp_path)
        (folder / PROOF).unlink()
        adapter, probe = load_adapter(folder)
        assert (adapter.base_fingerprint, probe) == (None, None)

    @pytest.mark.parametrize("keep", [0, 5, 200, -1])
    def test_truncated_weights_are_refused(self, adapter_folder, tmp_path, keep):
        folder = copy_of(adapter_folder, tmp_path)
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
        with pytest.raises(UserError, match=r"is corrupt or truncated .*take an earlier rounds/<n>/adapter"):
            load_adapter(folder)

    @pytest.mark.parametrize("name", [CONFIG, PROOF])
    @pytest.mark.parametrize("junk", [b"{", b"", b"\xff\xfe"])
    def test_damaged_text_is_refused(self, adapter_folder, tmp_path, name, junk):
        folder = copy_of(adapter_folder, tmp_path)
        (folder / name).write_bytes(junk)
        with pytest.raises(UserError, match="is corrupt or truncated"):
            load_adapter(folder)

    @pytest.mark.parametrize(("name", "text"), [(PROOF, "{}"), (PROOF, "[]"), (CONFIG, "[]")])
    def test_json_of_another_shape_is_refused(self, adapter_folder, tmp_path, name, text):
        folder = copy_of(adapter_folder, tmp_path)
        (folder / name).write_text(text)
        with pytest.raises(UserError, match="copy it again"):
            load_adapter(folder)

    def test_one_changed_bit_in_the_weights_is_refused(self, adapter_folder, tmp_path):
        folder = copy_of(adapter_folder, tmp_path)
        data = bytearray((folder / WEIGHTS).read_bytes())
        data[-1] ^= 1
        (folder / WEIGHTS).write_bytes(bytes(data))
        with pytest.raises(UserError, match=rf"is not what was saved: {WEIGHTS} does not match the hash in {PROOF}"):
            load_adapter(folder)

    def test_tensors_that_went_missing_are_refused(self, adapter_folder, tmp_path):
        folder = copy_of(adapter_folder, tmp_path)
        tensors = load_file(folder / WEIGHTS)
        save_file(dict(list(tensors.items())[1:]), folder / WEIGHTS)
        with pytest.raises(UserError, match="is not what was saved"):
            load_adapter(folder)

    def test_a_folder_without_tensors_is_refused(self, adapter_folder, tmp_path):
        folder = copy_of(adapter_folder, tmp_path)
        (folder / WEIGHTS).write_bytes(save({}))
        with pytest.raises(UserError, match="holds no tensor"):
            load_adapter(folder)


class TestProofOfTheConfig:
    """The numbers alone do not say what an adapter is: its scale stands in the config."""

    def edited(self, folder, place, **changed):
        copy = copy_of(folder, place)
        config = json.loads((copy / CONFIG).read_text())
        (copy / CONFIG).write_text(json.dumps({**config, **changed}))
        return copy

    @pytest.mark.parametrize("changed", [{"lora_alpha": 16.0}, {"use_rslora": True}, {"new_key": 1}])
    def test_an_edited_value_is_refused(self, adapter_folder, tmp_path, changed):
        folder = self.edited(adapter_folder, tmp_path, **changed)
        with pytest.raises(UserError, match=rf"is not what was saved: {CONFIG} does not match the hash in {PROOF}"):
            load_adapter(folder)
        (folder / PROOF).unlink()
        assert load_adapter(folder)[0].base_fingerprint is None

    def test_layout_and_the_base_s_name_may_change(self, adapter_folder, tmp_path):
        folder = self.edited(adapter_folder, tmp_path, base_model_name_or_path="/elsewhere")
        found, _ = load_adapter(folder)
        assert found.peft_config["base_model_name_or_path"] == "/elsewhere"
        assert found.base_fingerprint is not None
        assert proves_config(folder)

    def test_a_folder_of_an_earlier_version_loads_as_it_did(self, adapter_folder, tmp_path):
        folder = self.edited(adapter_folder, tmp_path, lora_alpha=16.0)
        proof = json.loads((folder / PROOF).read_text())
        del proof["config_hash"]
        (folder / PROOF).write_text(json.dumps(proof))
        assert load_adapter(folder)[0].peft_config["lora_alpha"] == 16.0
        assert not proves_config(folder)
