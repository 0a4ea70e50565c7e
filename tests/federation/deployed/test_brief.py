"""The brief of a run: what goes in comes out, and whatever else stands in a roll call is refused in words."""

import json

import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedunlearn.federation.deployed import brief as module
from fedunlearn.federation.deployed.brief import BRIEF, Brief, pack_brief, unpack_brief

GOOD = Brief(version="1", config={"mode": "train", "é": [1, 2.5, None, True, {"a": "b"}]}, partition="{}", request="[]")
PLAIN = {"version": "1", "config": {}, "partition": "", "request": ""}


def held(text):
    return RecordDict({BRIEF: ConfigRecord({"json": text})})


def test_a_brief_comes_out_as_it_went_in():
    assert unpack_brief(pack_brief(GOOD)) == GOOD


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"x": ConfigRecord({"json": "{}"})}),
        RecordDict({BRIEF: ConfigRecord()}),
        RecordDict({BRIEF: ConfigRecord({"json": 1})}),
        RecordDict({BRIEF: ConfigRecord({"json": b"{}"})}),
        RecordDict({BRIEF: ArrayRecord()}),
    ],
)
def test_a_roll_call_without_a_brief_is_refused(content):
    with pytest.raises(ValueError, match="the roll call holds no brief of a run"):
        unpack_brief(content)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "1",
        "{",
        "[" * 100_000,
        '{"config":' * 100_000,
        "9" * 5000,
        json.dumps({**PLAIN, "more": 1}),
        *(json.dumps({key: value for key, value in PLAIN.items() if key != gone}) for gone in PLAIN),
    ],
)
def test_what_is_no_brief_is_refused(text):
    with pytest.raises(ValueError, match="the brief of the run cannot be read"):
        unpack_brief(held(text))


@pytest.mark.parametrize(("key", "value"), [(key, 1) for key in PLAIN] + [("config", []), ("config", None), ("partition", {}), ("version", None)])  # fmt: skip
def test_values_of_other_types_are_refused(key, value):
    with pytest.raises(ValueError, match="the brief of the run holds values of other types"):
        unpack_brief(held(json.dumps({**PLAIN, key: value})))


def test_a_brief_that_is_too_long_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(module, "LONGEST_BRIEF", 100)
    assert unpack_brief(held(json.dumps(PLAIN))).version == "1"
    with pytest.raises(ValueError, match="the brief of the run has 101 characters, at most 100 are read"):
        unpack_brief(held("[" * 101))
