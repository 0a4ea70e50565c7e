"""One override of the command line, as the door reads it before Hydra does."""

from collections.abc import Collection
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from fedunlearn.doors.older_names import is_older_list

SEARCHPATH = "hydra.searchpath"


@dataclass(frozen=True, kw_only=True)
class UserOverride:
    """text: what Hydra is handed. key, value: its parts. is_choice: it chooses a member of a group. fault: why it is refused, or empty."""

    text: str
    key: str = ""
    value: str = ""
    is_choice: bool = False
    fault: str = ""

    @property
    def order(self) -> int:
        """Where composition wants it tried: search path, then group choices, then values."""
        return 0 if self.key == SEARCHPATH else 1 if self.is_choice else 2


def read_override(text: str, groups: Collection[str]) -> UserOverride:
    """Reads one override; a plain `key=value` that chooses no group becomes `++key=value`, so that the records judge the key."""
    parsed = parse_override(text)
    if isinstance(parsed, str):
        return UserOverride(text=text, fault=parsed)
    key = parsed.key_or_group
    if parsed.is_sweep_override() and is_older_list(key):
        return read_override(f"{parsed.get_key_element()}='{text.split('=', 1)[1]}'", groups)
    if parsed.is_sweep_override():
        fault = f"{text!r} is a sweep: add --multirun, or write a list as {key}=[a,b], or quote text as \"{key}='a,b'\""
        return UserOverride(text=text, key=key, fault=fault)
    value = "" if parsed.is_delete() else parsed.get_value_element_as_str()
    if key.startswith("hydra.") and key != SEARCHPATH:
        fault = f"{key}={value!r} has no effect here: Hydra composes only, and makes no folder, log or sweep; leave it out (allowed: {SEARCHPATH})"
        return UserOverride(text=text, key=key, fault=fault)
    is_choice = key in groups or "/" in key or parsed.package is not None
    plain = parsed.type is OverrideType.CHANGE and not is_choice and key != SEARCHPATH
    return UserOverride(text=f"++{text}" if plain else text, key=key, value=value, is_choice=is_choice)


def parse_override(text: str) -> Override | str:
    """Gives Hydra's reading of the text, or the fault in one sentence."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        return f"{text!r} is no override ({reason}): write key=value, and quote a value that holds = , [ ] {{ }} like this: \"key='a=b'\""
