"""Every file of configs/method is its class: all its fields, no other, with the class's own defaults."""

import importlib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import fedunlearn
from fedunlearn.methods.base import Method, Unlearner
from fedunlearn.methods.preference import Preference
from fedunlearn.server_methods.base import ServerMethod

FILES = sorted((Path(__file__).parents[2] / "configs" / "method").glob("*.yaml"))
NAMES = [path.stem for path in FILES]


def read(path):
    """The file's values, `???` among them as it stands, and the class that it names."""
    values = OmegaConf.to_container(OmegaConf.load(path))
    module, name = values.pop("_target_").rsplit(".", 1)
    return values, getattr(importlib.import_module(module), name)


def given_fields(member):
    return {field.name: field.default for field in fields(member) if field.init}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_has_exactly_the_fields_of_its_class(path):
    values, member = read(path)
    assert issubclass(member, Unlearner)
    assert set(values) == set(given_fields(member))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_its_values_are_the_class_s_defaults_and_a_value_without_one_is_asked_for(path):
    values, member = read(path)
    for name, default in given_fields(member).items():
        if default is MISSING:
            assert values[name] == "???"
        else:
            assert (values[name], type(values[name])) == (default, type(default)), name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_makes_its_method_by_its_values(path):
    values, member = read(path)
    method = member(**{name: 0.3 if value == "???" else value for name, value in values.items()})
    assert all(getattr(method, name) == value for name, value in values.items() if value != "???")


def test_it_stands_in_the_module_of_its_name_and_every_method_has_its_file():
    """configs/method/npo.yaml names fedunlearn.methods.npo (or server_methods); a member without a file could not be chosen."""
    members = {path: read(path)[1] for path in FILES}
    for path, member in members.items():
        folder = "server_methods" if issubclass(member, ServerMethod) else "methods"
        assert member.__module__ == f"fedunlearn.{folder}.{path.stem}"
    found = set()
    for folder in ("methods", "server_methods"):
        for path in (Path(fedunlearn.__file__).parent / folder).glob("[a-z]*.py"):
            module = importlib.import_module(f"fedunlearn.{folder}.{path.stem}")
            found |= {value for value in vars(module).values() if isinstance(value, type)}
    made = {member for member in found if issubclass(member, Unlearner)}
    assert made - {Unlearner, Method, Preference, ServerMethod} == set(members.values())


def test_the_prompt_of_altpo_asks_for_another_answer():
    values, _ = read(next(path for path in FILES if path.stem == "altpo"))
    text = values["prompt"].format(question="Who?", answer="Me.")
    assert "Question: Who?\nA known answer: Me.\n" in text
