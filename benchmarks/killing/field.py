"""Where the runs of one launcher are attacked: its command line, its places, and the federation where it takes one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from federation_here import FederationHere

from killing.launchers import LAUNCHERS, LauncherUnderAttack
from killing.stage import NUM_CLIENTS, Place, Stage


@dataclass(frozen=True, kw_only=True)
class Field:
    """name: of the launcher. federation: which serves all its runs, one after the other; None where each is alone."""

    name: str
    stage: Stage
    federation: FederationHere | None = None

    @property
    def launcher(self) -> LauncherUnderAttack:
        """What is attacked."""
        return LAUNCHERS[self.name]

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the command line."""
        return self.launcher.overrides if self.federation is None else self.federation.launcher

    def place(self, run: int | None) -> Place:
        """Where an attacked run lies; None: the undisturbed one."""
        name = f"{self.name}{'' if run is None else run}"
        return Place(self.stage.place / name) if self.federation is None else Place(self.stage.place, name, alone=False)


@contextmanager
def opened(stage: Stage, name: str) -> Iterator[Field]:
    """Starts the launcher's federation, where it takes one, and ends it. Its runs lie beside the fine-tuned one, which a SuperLink must find among its own."""
    if not LAUNCHERS[name].deployed:
        yield Field(name=name, stage=stage)
        return
    folder: Path = stage.place / "federation"
    pocket = stage.pocket
    with FederationHere(folder, clients=NUM_CLIENTS, data=pocket.data, model=pocket.model, saves=stage.place) as made:
        yield Field(name=name, stage=stage, federation=made)
