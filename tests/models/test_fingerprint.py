"""The base's fingerprint: by hand, blind to shards and loading dtype, and moved by one weight."""

import hashlib
import struct

import pytest
import torch
from helpers_eval import tiny_llama
from helpers_models import copy_of, load, model_config
from safetensors.torch import load_file, save_file

from fedunlearn.errors import UserError
from fedunlearn.models.fingerprint import fingerprint_base


def folder_of(place, name, tensors):
    (place / name).mkdir()
    save_file(tensors, place / name / "model.safetensors")
    return place / name


def test_by_hand(tmp_path):
    """sha256 of ["name", "dtype", [shape]] and the stored bytes, tensor by tensor in name order."""
    folder = folder_of(tmp_path, "m", {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor([3], dtype=torch.int64)})
    digest = hashlib.sha256(b'["a", "torch.int64", [1]]' + struct.pack("<q", 3))
    digest.update(b'["b", "torch.float32", [1, 2]]' + struct.pack("<2f", 1.0, 2.0))
    assert fingerprint_base(folder) == digest.hexdigest()


def test_shards_do_not_matter(base_folder, tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert fingerprint_base(tmp_path) == fingerprint_base(base_folder)


def test_the_dtype_it_is_loaded_in_does_not_matter(base_folder):
    wide, narrow = load(model_config(base_folder)), load(model_config(base_folder, torch_dtype="bfloat16"))
    assert narrow.model.dtype == torch.bfloat16
    assert wide.fingerprint == narrow.fingerprint == fingerprint_base(base_folder)


def test_the_dtype_it_is_stored_in_does(base_folder, tmp_path):
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    assert fingerprint_base(tmp_path) != fingerprint_base(base_folder)


def test_other_files_do_not_matter(base_folder, tmp_path):
    folder = copy_of(base_folder, tmp_path)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").unlink()
    assert fingerprint_base(folder) == fingerprint_base(base_folder)


def test_one_weight_by_one_bit_changes_it_even_in_the_same_file(base_folder, tmp_path):
    """The fingerprint is kept for a process; a file that is written anew under its old name is read again."""
    folder = copy_of(base_folder, tmp_path)
    before = fingerprint_base(folder)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors["model.norm.weight"]
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert before == fingerprint_base(base_folder)
    assert fingerprint_base(folder) != before


@pytest.mark.parametrize("other", [{"b": torch.ones(4)}, {"a": torch.ones(2, 2)}, {"a": torch.ones(4).double()}])
def test_names_shapes_and_types_change_it(tmp_path, other):
    one, two = folder_of(tmp_path, "one", {"a": torch.ones(4)}), folder_of(tmp_path, "two", other)
    assert fingerprint_base(one) != fingerprint_base(two)


def test_a_folder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"has no model\.safetensors.*save the model once with save_pretrained"):
        fingerprint_base(tmp_path)


@pytest.mark.parametrize("keep", [4, 500, -100])
def test_a_truncated_file_is_refused(base_folder, tmp_path, keep):
    folder = copy_of(base_folder, tmp_path)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(UserError, match=r"is corrupt or truncated .* fetch the model again"):
        fingerprint_base(folder)
