"""Files are whole or not there: what stands on the disk after a write that fails half-way."""

import errno
import json
import math
import os

import pytest

from fedunlearn.errors import UserError
from fedunlearn.files import append_line, canonical_json, take_lock, whole_folder, write_bytes, write_json


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_canonical_json_is_one_text_for_equal_values():
    assert (
        canonical_json({"b": 1, "a": [1.5, None]})
        == canonical_json({"a": [1.5, None], "b": 1})
        == '{"a": [1.5, null], "b": 1}'
    )
    assert canonical_json("é") == '"é"'


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_neither_nan_nor_infinity_is_written(tmp_path, bad):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": bad})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", [bad])
    assert names(tmp_path) == []


def test_write_json_is_sorted_indented_and_closed_by_a_newline(tmp_path):
    write_json(tmp_path / "x.json", {"b": "ü", "a": 1})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "a": 1,\n  "b": "ü"\n}\n'.encode()


def test_write_bytes_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "x.bin"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["x.bin"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_bytes(tmp_path / "x.json", b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        UserError, match=r"disk full while saving .*x\.json: nothing half-written was left.*resume=true"
    ):
        write_bytes(tmp_path / "x.json", b"new")
    assert names(tmp_path) == ["x.json"]
    assert (tmp_path / "x.json").read_bytes() == b"old"


def test_a_place_that_is_a_folder_cannot_be_written(tmp_path):
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"x cannot be written \(Is a directory\): choose another"):
        write_bytes(tmp_path / "x", b"new")
    assert names(tmp_path) == ["x"]


def test_a_place_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_bytes(tmp_path / "file" / "x.json", b"new")


def test_append_line_adds_one_line_each_time(tmp_path):
    append_line(tmp_path / "history.jsonl", json.dumps({"round": 1}))
    append_line(tmp_path / "history.jsonl", "zwölf")
    assert (tmp_path / "history.jsonl").read_bytes() == '{"round": 1}\nzwölf\n'.encode()


def test_append_line_says_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be written"):
        append_line(tmp_path / "missing" / "history.jsonl", "x")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="disk full"):
        append_line(tmp_path / "history.jsonl", "x")


def test_a_line_that_fails_is_taken_back(tmp_path, monkeypatch):
    """Half a line would stop a resumed run from reading its history."""
    append_line(tmp_path / "history.jsonl", "first")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="disk full"):
        append_line(tmp_path / "history.jsonl", "second")
    assert (tmp_path / "history.jsonl").read_text() == "first\n"


def test_a_whole_folder_takes_its_place_at_the_end(tmp_path):
    with whole_folder(tmp_path / "runs" / "adapter") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "runs" / "adapter").exists()
    assert names(tmp_path / "runs") == ["adapter"]
    assert (tmp_path / "runs" / "adapter" / "a").read_text() == "1"


def test_a_whole_folder_replaces_the_old_one_with_all_its_files(tmp_path):
    for name in ("old", "new"):
        with whole_folder(tmp_path / "adapter") as folder:
            (folder / name).write_text(name)
    assert names(tmp_path / "adapter") == ["new"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("error", [RuntimeError("half-way"), KeyboardInterrupt("half-way")])
def test_a_block_that_fails_leaves_the_old_folder(tmp_path, error):
    with whole_folder(tmp_path / "adapter") as folder:
        (folder / "old").write_text("old")

    def fail():
        with whole_folder(tmp_path / "adapter") as folder:
            (folder / "new").write_text("new")
            raise error

    with pytest.raises(type(error), match="half-way"):
        fail()
    assert names(tmp_path / "adapter") == ["old"]
    assert names(tmp_path) == ["adapter"]


def test_a_full_disk_inside_the_block_is_told(tmp_path):
    with pytest.raises(UserError, match=r"disk full while saving .*adapter"), whole_folder(tmp_path / "adapter"):
        full_disk()
    assert names(tmp_path) == []


def test_what_an_earlier_crash_left_under_the_temporary_name_is_not_taken_along(tmp_path):
    left = tmp_path / f".adapter.tmp{os.getpid()}"
    left.mkdir()
    (left / "stale").write_text("stale")
    with whole_folder(tmp_path / "adapter") as folder:
        (folder / "a").write_text("1")
    assert names(tmp_path / "adapter") == ["a"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"),
        whole_folder(tmp_path / "file" / "adapter"),
    ):
        raise AssertionError("the block must not run")


def test_json_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1]})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", {"b": [1, 2], "c": math.nan})
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == '{\n  "b": [\n    1\n  ]\n}\n'


def test_a_lock_is_taken_once_and_is_free_when_its_file_is_closed(tmp_path):
    with (tmp_path / "lock").open("w") as one, (tmp_path / "lock").open("w") as other:
        assert take_lock(one.fileno())
        assert not take_lock(other.fileno())
        one.close()
        assert take_lock(other.fileno())


def test_a_place_that_cannot_be_locked_is_no_lock_that_somebody_holds(tmp_path):
    with (tmp_path / "lock").open("w") as file:
        number = file.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        take_lock(number)
