"""Kept work costs each run once."""

import json

import pytest

from fedunlearn.training.charges import Charges, charges_of


def test_a_name_is_due_once_in_a_run_and_again_in_another(tmp_path):
    first = charges_of(tmp_path, "run", 3, 1)
    assert first.due(["a", "b"]) == {"a", "b"}
    assert first.due(["b", "c"]) == {"c"}
    assert charges_of(tmp_path, "run", 3, 2).due(["a", "c", "d"]) == {"d"}
    assert charges_of(tmp_path, "other", 3, 2).due(["a"]) == {"a"}
    assert charges_of(tmp_path, "run", 4, 2).due(["a"]) == {"a"}


def test_a_round_that_was_not_completed_is_charged_again(tmp_path):
    """Round 2 was broken off and is made again: what it had charged is due, what round 1 had is not."""
    path = tmp_path / "charged.json"
    Charges(path, 1).due(["a"])
    Charges(path, 2).due(["b"])
    assert Charges(path, 2).due(["a", "b"]) == {"b"}


def test_without_a_path_nothing_is_written(tmp_path):
    held = Charges(None, 1)
    assert held.due(["a"]) == {"a"}
    assert held.due(["a"]) == frozenset()
    assert not list(tmp_path.iterdir())


def test_an_id_from_the_wire_names_no_path(tmp_path):
    charges_of(tmp_path / "cache", "../../outside", 0, 1).due(["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize("damage", ["", "[1]", '{"a": "one"}', "null"])
def test_a_damaged_file_is_told_and_counted_anew(tmp_path, caplog, damage):
    path = tmp_path / "charged.json"
    path.write_text(damage)
    assert Charges(path, 2).due(["a"]) == {"a"}
    assert f"{path} is damaged" in caplog.text
    assert json.loads(path.read_text()) == {"a": 2}
