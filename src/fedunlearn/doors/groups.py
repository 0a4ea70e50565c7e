"""The groups of configs/ and their members, and what a failed composition means to the user."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType

from fedunlearn.doors.override import UserOverride
from fedunlearn.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups (`names`) that Hydra's search path has, for the primary file `config_name`."""

    config_name: str
    names: frozenset[str]
    loader: ConfigLoader

    def members(self, group: str) -> tuple[str, ...]:
        """What can be chosen, files of nested folders by their path (`unlearn/tofu/pocket`); empty for a group that is not there."""
        return tuple(_members(self.loader, group)) if group in self.names else ()

    def explain(self, override: UserOverride | None, error: Exception) -> str:
        """Gives one sentence for the error that composing under `override` (None: under all of them) raised."""
        said = str(error).split("\n    full_key:")[0].strip().replace("\n\t", ", ").replace("\n", "; ")
        if override is None or not override.is_choice:
            return f"{override.text.removeprefix('++')!r}: {said}" if override else said
        group, value = override.key, override.value
        if "No match in the defaults list" in said:
            return f"{group}={value!r}: {self.config_name} uses no group {group!r}; leave it out, or choose another --config-name"
        known = self.members(group)
        if known and value not in known:
            return f"{group}={value!r} is unknown{did_you_mean(value, known) or '.'} Known: {', '.join(known)} (configs/{group}/)"
        return f"{override.text!r}: {said}"

    def nearest(self, override: UserOverride) -> tuple[str, ...]:
        """The nearest choice that exists, with which the rest of the command line can still be checked; empty where none is near."""
        near = difflib.get_close_matches(override.value, self.members(override.key), n=1)
        return tuple(f"{override.key}={member}" for member in near)


def open_groups(config_dir: Path, config_name: str) -> Groups:
    """Lists the groups of the configuration that Hydra is initialised with. Raises UserError where `config_name` is not in it."""
    known = sorted(path.name for path in config_dir.glob("*.yaml"))
    if config_name.removesuffix(".yaml") + ".yaml" not in known:
        raise UserError(
            f"--config-name={config_name!r} is unknown{did_you_mean(config_name, known) or '.'} Known: {', '.join(known)} (configs/)"
        )
    loader = GlobalHydra.instance().config_loader()
    return Groups(config_name=config_name, names=frozenset(loader.list_groups("")), loader=loader)


def _members(loader: ConfigLoader, group: str) -> list[str]:
    below = [f"{name}/{member}" for name in loader.list_groups(group) for member in _members(loader, f"{group}/{name}")]
    return loader.get_group_options(group, ObjectType.CONFIG) + below
