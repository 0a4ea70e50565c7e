"""scripts/adapter.py on damaged and foreign adapters: one clear fault and nothing written, or an answer that says what it is."""

import json
import shutil
import warnings
from contextlib import suppress

import pytest
import safetensors.torch
from helpers_eval import byte_tokenizer
from helpers_families import adapter_of, base_of

from fedunlearn import lora
from fedunlearn.doors.adapter import read, serve
from fedunlearn.errors import UserError
from fedunlearn.models.adapter_files import CONFIG, PROOF, WEIGHTS, load_adapter, save_adapter
from fedunlearn.models.fingerprint import fingerprint_base
from fedunlearn.records.adapter import Adapter, B

READERS = ("summary", "merge", "export", "diff", "add", "scale", "negate", "card", "verify")
WRITERS = ("merge", "export", "add", "scale", "negate")


def call(*words):
    serve(read([str(word) for word in words]))


def on(verb, folder, place):
    """One command line of each verb, on that adapter."""
    words = {
        "diff": (folder, folder),
        "scale": (folder, "--by", "2"),
        "card": (folder, "--to", place / "card.md"),
    }.get(verb, (folder,))
    return (verb, *words, *(("--to", place / "out") if verb in WRITERS else ()))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base_of("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def made(base, tmp_path):
    """Saves an adapter for that base, foreign ones without our proof."""

    def make(name="one", times=1.0, foreign=False, **args):
        found = adapter_of("llama", **args)
        config = {**found.peft_config, "base_model_name_or_path": str(base)}
        tensors = {n: t * times if n.endswith(B) else t for n, t in found.tensors.items()}
        save_adapter(tmp_path / name, Adapter(tensors, config, fingerprint_base(base)))
        if foreign:
            (tmp_path / name / PROOF).unlink()
        return tmp_path / name

    return make


def edit(folder, **changed):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changed}))
    return folder


def refused(words, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        call(*words)
    assert sorted(tmp_path.rglob("*")) == before
    return "\n".join(caught.value.faults)


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"r": "16"}, "has r='16', which is no rank"),
        ({"lora_alpha": None}, "has lora_alpha=None, which is no scale"),
        ({"peft_type": "LOHA"}, "has peft_type='LOHA': only LORA is understood"),
        ({"use_dora": True}, "has use_dora=true, but"),
    ],
)
def test_a_config_that_is_none(verb, changed, said, made, tmp_path, capsys):
    assert said in refused(on(verb, edit(made(foreign=True), **changed), tmp_path), tmp_path)


@pytest.mark.parametrize("verb", READERS)
def test_numbers_that_are_not_finite(verb, made, tmp_path, capsys):
    assert "lora_B.weight' holds NaN or infinity (14 of 28 tensors)" in refused(
        on(verb, made(times=float("nan")), tmp_path), tmp_path
    )


@pytest.mark.parametrize("verb", READERS)
def test_a_factor_without_its_partner(verb, made, tmp_path, capsys):
    folder = made(foreign=True)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(dict(list(tensors.items())[1:]), folder / WEIGHTS)
    assert "lacks its partner" in refused(on(verb, folder, tmp_path), tmp_path)


@pytest.mark.parametrize("verb", READERS)
def test_a_config_that_was_edited_beside_its_proof(verb, made, tmp_path, capsys):
    folder = edit(made(), lora_alpha=64)
    assert f"{CONFIG} does not match the hash in {PROOF}" in refused(on(verb, folder, tmp_path), tmp_path)


@pytest.mark.parametrize("changed", [{"r": "16"}, {"lora_alpha": 0}])
def test_python_refuses_alike(changed, made, base):
    model = base_of("llama")
    with pytest.raises(UserError, match=f"adapter_config.json has {next(iter(changed))}="):
        lora.apply(model, edit(made(foreign=True), **changed), base_folder=base)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("verb", ["merge", "export", "add", "scale", "negate", "verify"])
def test_an_adapter_of_a_base_that_nobody_has(verb, made, tmp_path):
    folder = edit(made(foreign=True), init_lora_weights="pissa")
    assert "init_lora_weights='pissa' changed its base's weights" in refused(on(verb, folder, tmp_path), tmp_path)


class TestResults:
    """Sound adapters, and a result that is none, or nothing."""

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("scale", "--by", "1e300"), r"--by 1e\+300: the product is too large for torch.float32"),
            (("add", "--weights", "1", "1e30"), r"--weights 1 1e\+30: the sum is too large for torch.float32"),
            (("add", "--rank", "2", "--weights", "1", "1e30"), r"--weights 1 1e\+30: the sum is too large"),
        ],
    )
    def test_too_large(self, words, said, made, tmp_path):
        verb, *options = words
        adapters = [made(times=1e20)] * (2 if verb == "add" else 1)
        with pytest.raises(UserError, match=said):
            call(verb, *adapters, *options, "--to", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "words",
        [
            ("scale", "--by", "0"),
            ("scale", "--by", "1e-45"),
            ("add", "--weights", "0", "0"),
            ("add", "--weights", "1", "-1", "--rank", "2"),
        ],
    )
    def test_nothing_is_said_to_be_nothing(self, words, made, tmp_path, capsys):
        verb, *options = words
        call(verb, *[made()] * (2 if verb == "add" else 1), *options, "--to", tmp_path / "out")
        said = capsys.readouterr().out.splitlines()
        assert said[1:] == ["it is zero: it changes nothing of the base"]
        assert not any(t.any() for n, t in load_adapter(tmp_path / "out")[0].tensors.items() if n.endswith(B))

    def test_something_is_not(self, made, tmp_path, capsys):
        call("scale", made(), "--by", "1e-3", "--to", tmp_path / "out")
        assert "zero" not in capsys.readouterr().out


def checks(words, capsys):
    capsys.readouterr()
    with suppress(UserError):
        call(*words, "--json")
    return {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}


class TestVerify:
    def test_a_trusted_base_is_not_said_to_be_the_adapter_s(self, made, tmp_path, capsys):
        other = tmp_path / "other"
        base_of("llama", seed=5).save_pretrained(other)
        folder = made()
        found = checks(("verify", folder, "--base", other, "--trust-base"), capsys)["base fingerprint"]
        assert found["holds"] is None
        assert "not compared, the base is trusted" in found["said"]
        assert load_adapter(folder)[0].base_fingerprint in found["said"]
        assert fingerprint_base(other) in found["said"]

    def test_all_that_does_not_hold_is_shown(self, made, capsys):
        folder = edit(made(foreign=True, times=float("inf")), r=8)
        found = checks(("verify", folder), capsys)
        assert {name for name, check in found.items() if check["holds"] is False} == {"form", "finite"}
        assert found["config"]["holds"] is None


def test_a_bias_that_cannot_be_merged_is_told_once(made, tmp_path):
    folder = made(lora_bias=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        said = refused(("merge", folder, "--to", tmp_path / "out"), tmp_path)
    assert not [one for one in told if "shards" in str(one.message)]
    assert said.count("\n") == 0
    assert "has no bias to merge it into (14 layers" in said


def test_a_base_that_is_stored_quantised(base, made, tmp_path):
    stored = shutil.copytree(base, tmp_path / "stored")
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    said = refused(("verify", made(), "--base", stored), tmp_path)
    assert "is stored quantised (its config.json has quantization_config, bitsandbytes)" in said
