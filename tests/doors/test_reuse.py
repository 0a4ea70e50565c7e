"""When a run on disk stands for the one that is asked for: its config alone says nothing of what lies behind the paths in it."""

import hashlib
import json
import shutil

import pytest
from helpers_runs import finetune, tiny, unlearn

from fedunlearn.doors.reuse import how_to_begin, is_same
from fedunlearn.errors import UserError

EVAL = ("eval.at_end=true", "eval.max_new_tokens=1", "eval.max_rows=2")
ONE = ("trainer.federated.num_rounds=1",)


@pytest.fixture(scope="module")
def made(pocket, tmp_path_factory):
    """A fine-tuning run, its oracle, and an unlearning run held against that."""
    saves = tmp_path_factory.mktemp("made")
    tuned = finetune(pocket, saves, "ft", *ONE)
    oracle = finetune(pocket, saves, "oracle", "data=retain", f"partition.path={tuned}", *ONE, *EVAL)
    unlearn(pocket, saves, tuned, "un", f"retain_logs_path={oracle}", *ONE, *EVAL)
    return saves


@pytest.fixture
def asked(pocket, made, saves):
    """Gives a call that composes the same three over a copy of them, at the same paths."""
    shutil.copytree(made, saves)
    yield lambda name: composed(pocket, made, name)
    shutil.rmtree(made)
    shutil.copytree(saves, made)


def composed(pocket, made, name):
    tuned, oracle = made / "finetune" / "ft", made / "finetune" / "oracle"
    if name == "ft":
        return tiny(pocket, made, "finetune", "ft", *ONE)
    if name == "oracle":
        return tiny(pocket, made, "finetune", "oracle", "data=retain", f"partition.path={tuned}", *ONE, *EVAL)
    named = f"model.model_args.pretrained_model_name_or_path={tuned}"
    return tiny(pocket, made, "unlearn", "un", named, f"retain_logs_path={oracle}", *ONE, *EVAL)


NAMES = ("ft", "oracle", "un")


def same(asked):
    return {name for name in NAMES if is_same(asked(name))}


def test_what_is_as_it_was_made_is_the_same(asked, made):
    assert same(asked) == {"ft", "oracle", "un"}
    log = (made / "finetune" / "oracle" / "TOFU_EVAL.json").read_bytes()
    said = json.loads((made / "unlearn" / "un" / "TOFU_EVAL.json").read_text())["provenance"]
    assert said["retain_log"] == hashlib.sha256(log).hexdigest()
    assert json.loads(log)["provenance"]["retain_log"] is None


def test_another_fine_tuned_adapter_in_the_same_folder(asked, pocket, made):
    """Only the run that goes on from it is another: the oracle begins with a fresh adapter."""
    finetune(pocket, made, "ft", *ONE, "trainer.args.learning_rate=1e-4", "overwrite=true")
    assert same(asked) == {"oracle"}
    assert how_to_begin(asked("un")) == ("overwrite=true",)
    finetune(pocket, made, "ft", *ONE, "overwrite=true")
    assert same(asked) == {"ft", "oracle", "un"}


def test_another_partition_behind_the_same_path(asked, made):
    path = made / "finetune" / "ft" / "partition.json"
    dealt = json.loads(path.read_text())
    dealt["clients"][0], dealt["clients"][1] = dealt["clients"][1], dealt["clients"][0]
    path.write_text(json.dumps({key: value for key, value in dealt.items() if key != "hash"}))
    assert same(asked) == {"ft"}


def test_another_log_of_the_oracle_be_it_in_one_byte(asked, made):
    path = made / "finetune" / "oracle" / "TOFU_EVAL.json"
    path.write_bytes(path.read_bytes() + b"\n")
    assert same(asked) == {"ft", "oracle"}


@pytest.mark.parametrize("lost", ["done.json", "TOFU_EVAL.json", "config.json", "provenance.json"])
def test_a_run_that_lacks_a_part_is_not_taken(asked, made, lost):
    (made / "unlearn" / "un" / lost).unlink()
    assert same(asked) == {"ft", "oracle"}


@pytest.mark.parametrize(("lost", "said"), [("done.json", "resume=true"), ("provenance.json", "overwrite=true")])
def test_what_was_stopped_goes_on_where_it_was_begun_alike(asked, made, lost, said):
    folder = made / "unlearn" / "un"
    assert how_to_begin(asked("un")) == ("overwrite=true",)
    (folder / "done.json").unlink()
    (folder / lost).unlink(missing_ok=True)
    assert how_to_begin(asked("un")) == (said,)
    shutil.rmtree(folder)
    assert how_to_begin(asked("un")) == ()


def test_one_that_was_stopped_before_its_adapter_was_made_anew_begins_in_its_place(asked, pocket, made):
    (made / "unlearn" / "un" / "done.json").unlink()
    finetune(pocket, made, "ft", *ONE, "trainer.args.learning_rate=1e-4", "overwrite=true")
    assert how_to_begin(asked("un")) == ("overwrite=true",)


def test_a_damaged_adapter_behind_it_is_told(asked, made):
    (made / "finetune" / "ft" / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is corrupt or truncated"):
        is_same(asked("un"))
