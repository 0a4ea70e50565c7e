"""Each YAML of configs/protocol: it has its class's fields, no other, with the class's own defaults."""

import importlib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import fedunlearn
from fedunlearn.protocols.base import Protocol

FILES = sorted((Path(__file__).parents[2] / "configs" / "protocol").glob("*.yaml"))
NAMES = [path.stem for path in FILES]


def read(path):
    """The file's values, `???` among them as it stands, and the class that it names."""
    values = OmegaConf.to_container(OmegaConf.load(path))
    module, name = values.pop("_target_").rsplit(".", 1)
    return values, getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_has_exactly_the_fields_of_its_class(path):
    values, member = read(path)
    assert issubclass(member, Protocol)
    assert set(values) == {field.name for field in fields(member)}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_its_values_are_the_class_s_defaults_and_a_value_without_one_is_asked_for(path):
    values, member = read(path)
    for field in fields(member):
        wanted = "???" if field.default is MISSING else field.default
        assert (values[field.name], type(values[field.name])) == (wanted, type(wanted)), field.name


def test_it_stands_in_the_module_of_its_name_and_every_protocol_has_its_file():
    """configs/protocol/in_round.yaml names fedunlearn.protocols.in_round; a member without a file could not be chosen."""
    members = {path: read(path)[1] for path in FILES}
    assert all(member.__module__ == f"fedunlearn.protocols.{path.stem}" for path, member in members.items())
    found = set()
    for path in (Path(fedunlearn.__file__).parent / "protocols").glob("[a-z]*.py"):
        module = importlib.import_module(f"fedunlearn.protocols.{path.stem}")
        found |= {value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Protocol)}
    assert found - {Protocol} == set(members.values())
