"""A site's YAML: read strictly, its paths made absolute and looked up."""

import dataclasses
import os
import typing
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from fedunlearn.errors import UserError


@dataclasses.dataclass(frozen=True)
class PathTo:
    """Marks a field's type as a path. kind: `file` and `folder` must be there when the YAML is read; `new` need not be."""

    kind: Literal["file", "folder", "new"]


FilePath = Annotated[str, PathTo("file")]
FolderPath = Annotated[str, PathTo("folder")]
NewPath = Annotated[str, PathTo("new")]


def read_yaml(path: Path) -> Mapping[str, object]:
    """Gives the mapping that a YAML file holds. Raises UserError where it cannot be read, is no YAML, no mapping, or gives a key twice."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Strict)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        held = "nothing" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{path} holds {held}: a site's YAML is a mapping, one `key: value` a line")
    return data


class _Strict(yaml.SafeLoader):
    """Refuses what YAML would take silently: a key given twice, of which the last one would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} given twice in line {node.start_mark.line + 1} or below: keep one")
        return super().construct_mapping(node, deep)


def absolute_paths(
    cls: type, data: Mapping[str, object], folder: Path, key: str = ""
) -> tuple[dict[str, object], list[str]]:
    """Gives `data` with every path of the record `cls` and of the records in it made absolute, and a fault for each that must be there and is not.

    Relative paths start at `folder`, `~` is the user's home. Values of other types stay as they are, for the reader to refuse.
    """
    found, faults = dict(data), []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        parts = list(_parts(hint))
        records = [part for part in parts if isinstance(part, type) and dataclasses.is_dataclass(part)]
        marks = [part for part in parts if isinstance(part, PathTo)]
        value = data.get(name)
        if records and isinstance(value, Mapping):
            found[name], more = absolute_paths(records[0], value, folder, f"{key}{name}.")
        elif marks and name in data:
            found[name], more = _absolute(value, marks[0], folder, f"{key}{name}")
        else:
            continue
        faults += more
    return found, faults


def _parts(hint: object) -> Iterator[object]:
    """The hint, what it is made of, and what marks it."""
    yield hint
    yield from getattr(hint, "__metadata__", ())
    for inner in typing.get_args(hint):
        yield from _parts(inner)


def _absolute(value: object, mark: PathTo, folder: Path, key: str) -> tuple[object, list[str]]:
    if isinstance(value, Mapping):
        pairs = {name: _absolute(inner, mark, folder, f"{key}.{name}") for name, inner in value.items()}
        return {name: path for name, (path, _) in pairs.items()}, [
            fault for _, more in pairs.values() for fault in more
        ]
    if not isinstance(value, str):
        return value, []
    path = Path(os.path.abspath(folder / Path(value).expanduser()))  # not resolve(): what a link names may change
    if mark.kind == "new" or (path.is_file() if mark.kind == "file" else path.is_dir()):
        return str(path), []
    what = f"is no {mark.kind}" if path.exists() else "does not exist"
    way_out = f"give the path of a {mark.kind} (relative paths start at the YAML's folder)"
    return str(path), [f"{key}={value!r}: {path} {what}; {way_out}"]
