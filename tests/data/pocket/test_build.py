"""The pocket on disk: built once, kept, and built again when anything in it is not what was built."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedunlearn.data.pocket import PocketRecipe, build, ensure_pocket
from fedunlearn.data.pocket.build import folder_sha256
from fedunlearn.data.pocket.pretrain import BaseRecipe, batch_loss, collate, encode
from fedunlearn.data.pocket.world import Pair, WorldSize

TINY = PocketRecipe(
    world=WorldSize(num_crowd=5, num_known=3, num_facts=4),
    base=BaseRecipe(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        steps=3,
        known_rows=2,
        crowd_rows=1,
        fact_rows=1,
    ),
)


@pytest.fixture
def built(tmp_path):
    return ensure_pocket(0, tmp_path, TINY)


def test_it_lies_where_it_is_said_to_lie(built, tmp_path):
    assert (built.data, built.model) == (tmp_path / "seed0" / "data", tmp_path / "seed0" / "model")
    assert {path.name for path in tmp_path.iterdir()} == {"seed0"}
    assert (built.data / "forget10.json").is_file()


def test_model_and_tokenizer_load_and_generate(built):
    tokenizer, model = AutoTokenizer.from_pretrained(built.model), AutoModelForCausalLM.from_pretrained(built.model)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert prompt["input_ids"].shape[1] < generated.shape[1] <= prompt["input_ids"].shape[1] + 4


def test_the_record_says_what_was_built(built, tmp_path):
    record = json.loads((tmp_path / "seed0" / "pocket.json").read_text())
    assert record["recipe"]["version"] == build.RECIPE_VERSION
    assert record["recipe"]["base"]["steps"] == 3
    assert record["data_sha256"] == folder_sha256(built.data)
    assert record["model_sha256"] == folder_sha256(built.model)
    assert record["seconds"] >= 0


def test_a_good_pocket_is_kept(built, tmp_path, caplog):
    stamp = (tmp_path / "seed0" / "pocket.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        assert ensure_pocket(0, tmp_path, TINY) == built
    assert (tmp_path / "seed0" / "pocket.json").stat().st_mtime_ns == stamp
    assert caplog.records == []


def test_the_same_seed_builds_the_same_bytes_and_another_seed_others(built, tmp_path):
    again = ensure_pocket(0, tmp_path / "again", TINY)
    other = ensure_pocket(1, tmp_path, TINY)
    for part in ("data", "model"):
        assert folder_sha256(getattr(again, part)) == folder_sha256(getattr(built, part))
        assert folder_sha256(getattr(other, part)) != folder_sha256(getattr(built, part))


def spoil_data(folder):
    with (folder / "data" / "full.json").open("a") as file:
        file.write("{}\n")


def spoil_weights(folder):
    path = folder / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def lose_the_tokenizer(folder):
    (folder / "model" / "tokenizer.json").unlink()


def lose_the_record(folder):
    (folder / "pocket.json").unlink()


def garble_the_record(folder):
    (folder / "pocket.json").write_text('{"seed": 0}')


def raise_the_version(folder):
    record = json.loads((folder / "pocket.json").read_text())
    record["recipe"]["version"] -= 1
    (folder / "pocket.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_data, "files of data/ are not those that were built"),
        (spoil_weights, "files of model/ are not those that were built"),
        (lose_the_tokenizer, "files of model/ are not those that were built"),
        (lose_the_record, "pocket.json cannot be read"),
        (garble_the_record, "pocket.json cannot be read"),
        (raise_the_version, "follows another recipe"),
    ],
)
def test_what_is_not_as_built_is_built_again_and_said_once(built, tmp_path, caplog, spoil, said):
    good = folder_sha256(built.data), folder_sha256(built.model)
    spoil(tmp_path / "seed0")
    with caplog.at_level(logging.INFO, logger="fedunlearn.data.pocket.build"):
        ensure_pocket(0, tmp_path, TINY)
    assert [said in record.message for record in caplog.records if record.name.endswith("build")] == [True]
    assert (folder_sha256(built.data), folder_sha256(built.model)) == good
    assert {path.name for path in tmp_path.iterdir()} == {"seed0"}


def test_another_recipe_is_built_anew(built, tmp_path, caplog):
    old = folder_sha256(built.model)
    with caplog.at_level(logging.INFO, logger="fedunlearn.data.pocket.build"):
        ensure_pocket(0, tmp_path, replace(TINY, base=replace(TINY.base, steps=4)))
    assert "building the pocket of seed 0 (the one on disk follows another recipe)" in caplog.text
    assert folder_sha256(built.model) != old


def test_a_build_that_dies_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    def die(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(build, "_write_model", die)
    with pytest.raises(RuntimeError, match="killed"):
        ensure_pocket(0, tmp_path, TINY)
    assert list(tmp_path.iterdir()) == []


def test_one_that_another_process_built_meanwhile_is_kept(tmp_path, monkeypatch):
    built = ensure_pocket(0, tmp_path, TINY)
    faults = iter(["first use", None])
    monkeypatch.setattr(build, "find_fault", lambda *_: next(faults))
    inode = (tmp_path / "seed0").stat().st_ino
    assert ensure_pocket(0, tmp_path, TINY) == built
    assert (tmp_path / "seed0").stat().st_ino == inode


@pytest.mark.slow
def test_the_full_base_knows_its_facts_and_not_the_authors(tmp_path):
    paths = ensure_pocket(5, tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(paths.model), AutoModelForCausalLM.from_pretrained(paths.model)

    def probability(name):
        rows = [json.loads(line) for line in (paths.data / f"{name}.json").read_text(encoding="utf8").splitlines()]
        encoded = encode(tokenizer, [Pair(row["question"], row["answer"]) for row in rows])
        with torch.no_grad():
            return torch.exp(-batch_loss(model, collate(encoded, tokenizer.pad_token_id))).item()

    assert probability("world_facts") > 0.7
    assert probability("real_authors") > 0.5
    assert probability("full") < 0.35
    assert abs(probability("forget10") - probability("holdout10")) < 0.1
