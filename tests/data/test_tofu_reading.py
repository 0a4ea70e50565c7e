"""TOFU as it is read: splits, hashes, pairs of splits, and every way in which a folder or a hub id can be wrong."""

import json
import time
from types import SimpleNamespace

import pytest
from helpers_eval import SHARED, needs_shared, write_folder

from fedunlearn.data import tofu_sources
from fedunlearn.data.tofu import QaRow, check_splits, load_tofu
from fedunlearn.data.tofu_sources import FolderSource, HubSource
from fedunlearn.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "tofu")


def test_rows_come_in_order_and_are_read_once(folder, monkeypatch):
    tofu = load_tofu(str(folder))
    reads = []
    monkeypatch.setattr(
        FolderSource, "read", lambda self, split, read=FolderSource.read: reads.append(split) or read(self, split)
    )
    assert tofu.rows("full")[3] == QaRow("Who is 1?", "A3 .")
    assert tofu.rows("full") is tofu.rows("full")
    tofu.perturbed("forget10")
    tofu.rows("forget10_perturbed")
    assert reads == ["full", "forget10_perturbed"]


def test_perturbed_rows_hold_all_answers(folder):
    tofu = load_tofu(str(folder))
    row = tofu.perturbed("forget10")[0]
    assert (row.answer, row.paraphrased_answer, row.paraphrased_question) == ("A36 .", "It is A36 .", "Who?")
    assert row.perturbed_answers == tuple(f"A36 . {k}" for k in range(5))
    fact = tofu.perturbed("world_facts")[0]
    assert fact.paraphrased_answer is None
    assert len(fact.perturbed_answers) == 3


def test_rows_per_author_is_a_property_of_the_data(folder, tmp_path):
    assert load_tofu(str(folder)).rows_per_author == 2
    assert load_tofu(str(write_folder(tmp_path / "plain", layout=False))).rows_per_author == 20


def test_a_list_is_read_like_json_lines(folder):
    before = load_tofu(str(folder))
    rows = [json.loads(line) for line in (folder / "full.json").read_text().splitlines()]
    (folder / "full.json").write_text(json.dumps(rows))
    assert load_tofu(str(folder)).rows("full") == before.rows("full")


def test_hash_follows_texts_and_order_only(folder, tmp_path):
    tofu, twin = load_tofu(str(folder)), load_tofu(str(write_folder(tmp_path / "twin", layout=False)))
    assert tofu.hash("full") == twin.hash("full")
    assert tofu.hash("forget10") != tofu.hash("forget10_perturbed")
    lines = (folder / "full.json").read_text().splitlines()
    (folder / "full.json").write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    assert load_tofu(str(folder)).hash("full") != twin.hash("full")


def test_matching_splits_pass_and_others_are_named(folder):
    tofu = load_tofu(str(folder))
    check_splits(tofu, "forget10", "retain90")
    assert (*tofu.rows("retain90"), *tofu.rows("forget10")) == tofu.rows("full")
    for forget, retain in (
        ("forget10", "retain95"),
        ("retain90", "forget10"),
        ("forget10", "holdout10"),
        ("forget00", "retain100"),
    ):
        with pytest.raises(
            UserError, match=f"forget_split='{forget}' and retain_split='{retain}' are no pair.*forget10 with retain90"
        ):
            check_splits(tofu, forget, retain)


def test_splits_are_compared_by_row_and_not_by_count(folder):
    rows = (folder / "retain90.json").read_text().splitlines()
    (folder / "retain90.json").write_text("\n".join([rows[1], rows[0], *rows[2:]]))
    with pytest.raises(
        UserError,
        match=r"forget10' \(4 rows\) and retain_split='retain90' \(36 rows\).*not the end and the beginning.*fetch the data again",
    ):
        check_splits(load_tofu(str(folder)), "forget10", "retain90")


def test_a_part_of_an_author_is_refused(folder):
    (folder / "tofu.json").write_text('{"rows_per_author": 3}')
    with pytest.raises(
        UserError, match=r"forget10' has 4 rows, no whole number of authors at 3 rows each.*rows_per_author"
    ):
        check_splits(load_tofu(str(folder)), "forget10", "retain90")


def test_a_split_below_one_author_is_missing_for_that_reason(folder):
    """20 authors: 1 % is a fifth of one."""
    with pytest.raises(
        UserError,
        match=r"no split 'forget01': 1 % of its 20 authors is no whole number.*it has: forget05, .*retain95.*Choose one",
    ):
        load_tofu(str(folder)).rows("forget01")
    with pytest.raises(UserError, match="no split 'retain99': 1 % of its 20 authors"):
        load_tofu(str(folder)).rows("retain99")
    with pytest.raises(UserError, match="no split 'holdout20'; it has: "):
        load_tofu(str(folder)).rows("holdout20")


@pytest.mark.parametrize("path", ["./nowhere/tofu", "/nowhere/tofu", "a/b/c", "../tofu", "pocket:0", ""])
def test_a_path_that_is_no_folder_is_refused_without_asking_the_hub(path, monkeypatch):
    monkeypatch.setattr(tofu_sources, "_hub_has", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(
        UserError, match=r"tofu_path='.*' is no folder; give the folder .* or a hub id such as locuslab/TOFU"
    ):
        load_tofu(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "Who?"}', "forget10 row 0 needs a text in column 'answer'.*take another tofu_path"),
        ('{"answer": 3, "question": "Who?"}', "forget10 row 0 needs a text in column 'answer'"),
        ("not json", "neither JSON lines nor a JSON list.*fetch the file again"),
        ("[1, 2]", "expected one JSON object a row"),
        ("", "at least one row"),
    ],
)
def test_a_broken_file_is_named(folder, text, message):
    (folder / "forget10.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_tofu(str(folder)).rows("forget10")


def test_missing_wrong_answers_are_named(folder):
    (folder / "forget10_perturbed.json").write_text('{"question": "Who?", "answer": "I", "perturbed_answer": "You"}')
    with pytest.raises(UserError, match="forget10_perturbed row 0 needs a list of texts in column 'perturbed_answer'"):
        load_tofu(str(folder)).perturbed("forget10")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "tofu.json: expected"), ('{"authors": "many"}', "whole numbers"), ('{"rows_per_author": 0}', "at least 1")],
)
def test_a_broken_layout_is_named(folder, text, message):
    (folder / "tofu.json").write_text(text)
    if text == "[]":
        (folder / "tofu.json").write_text("[")
    with pytest.raises(UserError, match=message):
        load_tofu(str(folder))


def test_no_network_is_told_at_once_and_not_after_retries(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    tofu = load_tofu("nobody-at-all/no-such-tofu")
    with pytest.raises(
        UserError, match=r"'full' is not in the cache and the hub cannot be reached.*HF_HUB_OFFLINE=1.*local folder"
    ):
        tofu.rows("full")
    assert time.monotonic() - start < 15


def test_hub_rows_come_through_load_dataset(monkeypatch):
    import datasets

    asked = []

    def load(path, name, split):
        asked.append((path, name, split, datasets.config.HF_HUB_OFFLINE))
        if name == "forget33":
            raise ValueError("BuilderConfig 'forget33' not found. Available: ['full']")
        return datasets.Dataset.from_list([{"question": "Who?", "answer": "I"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(tofu_sources, "_hub_has", lambda name: name == "locuslab/TOFU")
    assert load_tofu("locuslab/TOFU").rows("full") == (QaRow("Who?", "I"),)
    HubSource("locuslab/TOFU", online=False).read("full")
    assert asked == [("locuslab/TOFU", "full", "train", False), ("locuslab/TOFU", "full", "train", True)]
    assert datasets.config.HF_HUB_OFFLINE is False
    with pytest.raises(UserError, match=r"no readable split 'forget33' .*Available.*choose a split"):
        load_tofu("locuslab/TOFU").rows("forget33")


def hub_that_raises(monkeypatch, error):
    from huggingface_hub import HfApi

    def dataset_info(self, name, timeout):
        assert timeout <= 10
        raise error

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)


def test_a_hub_without_such_a_data_set_is_told_from_one_that_does_not_answer(monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    response = SimpleNamespace(headers={}, request=None)
    client_fault = type("ConnectError", (type("TransportError", (Exception,), {}),), {})
    hub_that_raises(monkeypatch, RepositoryNotFoundError("gone", response=response))
    with pytest.raises(
        UserError, match=r"tofu_path='no/such' is neither a folder here nor a data set on the hub.*locuslab/TOFU"
    ):
        load_tofu("no/such")
    hub_that_raises(monkeypatch, HfHubHTTPError("500 server error", response=response))
    with pytest.raises(
        UserError, match=r"the hub answers with an error \(500.*try again later, or give a local folder"
    ):
        load_tofu("no/such")
    for fault in (
        client_fault("no route"),
        TimeoutError("late"),
        ConnectionError("refused"),
    ):
        hub_that_raises(monkeypatch, fault)
        assert tofu_sources.open_source("no/such") == HubSource("no/such", online=False)
    hub_that_raises(monkeypatch, KeyError("a fault of ours"))
    with pytest.raises(KeyError, match="a fault of ours"):
        load_tofu("no/such")


@needs_shared
def test_the_copy_of_tofu_is_what_the_paper_describes():
    tofu = load_tofu(str(SHARED / "tofu"))
    for share in ("01", "05", "10"):
        check_splits(tofu, f"forget{share}", f"retain{100 - int(share)}")
    assert len(tofu.rows("full")) == 4000
    assert [len(tofu.perturbed(name)) for name in ("forget10", "retain", "real_authors", "world_facts")] == [
        400,
        400,
        100,
        117,
    ]
    assert sum(row.question == "What is the full name of the author?" for row in tofu.rows("full")) == 2
