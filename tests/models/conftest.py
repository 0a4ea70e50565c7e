"""A tiny base on disk and an adapter for it; no model is left to the next file."""

import pytest
from helpers_eval import byte_tokenizer, tiny_llama
from helpers_models import drawn, load, model_config

from fedunlearn.models.adapter_files import save_adapter
from fedunlearn.models.resident import release, take_probe


@pytest.fixture(scope="module", autouse=True)
def _no_model_left():
    yield
    release()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A full model with its tokenizer, float32."""
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(base_folder, tmp_path_factory):
    """An adapter of ours on that base, with proof, that moves its logits."""
    folder = tmp_path_factory.mktemp("run") / "adapter"
    made = load(model_config(base_folder))
    made.put(drawn(made.take()))
    save_adapter(folder, made.take(), take_probe(made))
    release()
    return folder
