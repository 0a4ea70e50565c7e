"""What a config's two paths name: every case, and the way out of the wrong ones."""

import json
from types import SimpleNamespace

import pytest
from helpers_models import NOWHERE, copy_of, lora_args

from fedunlearn.config.model import ModelArgs
from fedunlearn.data.pocket import named
from fedunlearn.errors import UserError
from fedunlearn.models.source import ModelSource, resolve_source, run_of


def find(path, lora=None, **changed):
    """Resolves the two paths of a config."""
    args = ModelArgs(
        pretrained_model_name_or_path=str(path),
        lora_config=lora_args(),
        lora_model_path=None if lora is None else str(lora),
        **changed,
    )
    return resolve_source(args, NOWHERE)


@pytest.fixture
def run(adapter_folder, tmp_path):
    """A finished run: partition, result, one kept round."""
    folder = tmp_path / "run"
    for place in (folder, folder / "rounds" / "3"):
        place.mkdir(parents=True)
        copy_of(adapter_folder, place).rename(place / "adapter")
    (folder / "partition.json").write_text("{}")
    return folder


def test_a_full_model(base_folder):
    assert find(base_folder) == ModelSource(base=base_folder, base_name=str(base_folder))


def test_an_adapter_folder_brings_its_base(adapter_folder, base_folder):
    wanted = ModelSource(base=base_folder, base_name=str(base_folder), adapter=adapter_folder)
    assert find(adapter_folder) == wanted


def test_a_run_is_its_result_and_is_known_as_a_run(run, base_folder):
    found = find(run)
    assert (found.adapter, found.run, found.base) == (run / "adapter", run.resolve(), base_folder)
    assert find(run / "adapter") == found


def test_a_kept_round_belongs_to_its_run(run):
    found = find(run / "rounds" / "3")
    assert found.adapter == run / "rounds" / "3" / "adapter"
    assert found.run == find(found.adapter).run == run.resolve()


@pytest.mark.parametrize("named", [".", "factors"])
def test_a_round_with_a_side_car_is_exported_first(adapter_folder, tmp_path, named):
    """Its factors alone would load as an adapter, and be another one."""
    place = tmp_path / "run" / "rounds" / "0001"
    place.mkdir(parents=True)
    copy_of(adapter_folder, place).rename(place / "factors")
    (place / "checkpoint.json").write_text("{}")
    with pytest.raises(
        UserError, match=rf"is a round with a side-car, .*`adapter.py export {place} --to FOLDER` first"
    ):
        find(place / named)


@pytest.mark.parametrize(
    ("began", "said"),
    [
        ('{"sidecar": ["aa"]}', "is what a run with a side-car began with, .*: name the run, one of its rounds"),
        ("{", r"what lies beside it is damaged \(began.json"),
    ],
)
def test_a_beginning_with_a_side_car_is_no_adapter(adapter_folder, tmp_path, began, said):
    copy_of(adapter_folder, tmp_path).rename(tmp_path / "start")
    (tmp_path / "began.json").write_text(began)
    with pytest.raises(UserError, match=said):
        find(tmp_path / "start")


def test_a_beginning_without_one_is(adapter_folder, tmp_path):
    copy_of(adapter_folder, tmp_path).rename(tmp_path / "start")
    (tmp_path / "began.json").write_text('{"sidecar": []}')
    assert find(tmp_path / "start").adapter == tmp_path / "start"


def test_lora_model_path_stands_beside_a_named_base(run, base_folder):
    found = find(base_folder, run)
    assert (found.base, found.base_name, found.adapter) == (base_folder, str(base_folder), run / "adapter")
    assert found.run == run.resolve()


def test_an_adapter_outside_a_run_has_none(adapter_folder):
    assert run_of(adapter_folder) is None
    assert run_of(None) is None


def test_two_adapters_are_refused(adapter_folder, run):
    with pytest.raises(UserError, match=r"two adapters are named: .* and lora_model_path=.*: give one of them"):
        find(adapter_folder, run)


def test_a_full_model_as_adapter_is_refused(base_folder):
    with pytest.raises(
        UserError, match=r"lora_model_path=.* is a full model, no adapter: name it as pretrained_model_name_or_path"
    ):
        find(base_folder, base_folder)


def test_an_adapter_without_lora_is_refused(adapter_folder):
    with pytest.raises(UserError, match=r"use_lora=false, but .* is an adapter: set use_lora=true"):
        find(adapter_folder, use_lora=False)


@pytest.mark.parametrize("name", ["../nowhere", "./a/b", "a/b/c", "/no/such/folder", "plain"])
def test_a_path_that_is_not_there_and_no_hub_id_is_refused(name):
    with pytest.raises(
        UserError, match=r"does not exist: give a folder that does, a hub id \(owner/name\) or pocket:SEED"
    ):
        find(name)


def test_a_hub_id_that_cannot_be_had_says_what_to_check(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"'nobody/no-such-model' is no folder here, and the model hub did not give it .*HF_HUB_OFFLINE"
    ):
        find("nobody/no-such-model")


def test_a_missing_adapter_path_is_refused(base_folder, tmp_path):
    with pytest.raises(UserError, match=r"lora_model_path='.*missing' does not exist"):
        find(base_folder, tmp_path / "missing")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"holds neither config\.json \(a model\) nor adapter_config\.json \(an adapter\) nor adapter/"
    ):
        find(tmp_path)


def test_an_unfinished_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task_name": "ft", "mode": "train"}))
    with pytest.raises(
        UserError, match=r"is a run without a result .*finish it with resume=true, or name rounds/<n>/adapter"
    ):
        find(tmp_path)


def test_an_evaluation_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task_name": "e", "mode": "eval"}))
    with pytest.raises(UserError, match="is an evaluation, which holds no model: name what was evaluated"):
        find(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_model_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"its config\.json is .*; fetch the model again"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"adapter_config\.json is damaged \(.*: copy the adapter folder again"),
        ("[]", r"adapter_config\.json is damaged \(.*: copy the adapter folder again"),
        ("{}", "names no base: give pretrained_model_name_or_path=BASE and this folder as lora_model_path"),
        ('{"base_model_name_or_path": null}', "names no base"),
        ('{"base_model_name_or_path": "/gone/base"}', r"adapter_config\.json.*/gone/base' does not exist"),
    ],
)
def test_an_adapter_whose_base_cannot_be_found_is_refused(tmp_path, text, said):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        find(tmp_path)


def test_an_adapter_on_an_adapter_is_refused(adapter_folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(adapter_folder)}))
    with pytest.raises(UserError, match="is an adapter, where a full model is wanted"):
        find(tmp_path)


def test_a_base_that_moved_is_named_beside_the_adapter(adapter_folder, base_folder, tmp_path):
    """The way out of an adapter whose config names a path that is gone."""
    folder = copy_of(adapter_folder, tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    assert find(base_folder, folder).base == base_folder


def test_a_pocket_is_built_and_called_by_its_path(base_folder, monkeypatch):
    """The pocket itself is built in its own tests; here a fake stands for it."""
    built = []

    def fake(seed, folder):
        built.append((seed, folder))
        return SimpleNamespace(model=base_folder)

    monkeypatch.setattr(named, "ensure_pocket", fake)
    assert find("pocket:7") == ModelSource(base=base_folder, base_name=str(base_folder))
    assert set(built) == {(7, NOWHERE)}
