"""Records of the `launcher` group: where the clients run."""

from dataclasses import dataclass
from typing import Literal

from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST

START_TIMEOUT = 120.0


class Launcher:
    """Where the ClientApp runs. One record a launcher; fedunlearn.federation.launchers knows how to start each."""

    @property
    def survives_lost_clients(self) -> bool:
        """Whether a round can go on when a client raised or fell silent; else that ends the run with an error."""
        return True

    @property
    def clock(self) -> Literal["round", "client", "none"]:
        """What trainer.federated.round_timeout counts for.

        round: one deadline for a whole round, which the round loop keeps; client: each client's own turn, which the Grid
        keeps; none: it does not act.
        """
        return "round"

    @property
    def nodes_change(self) -> bool:
        """Whether nodes may come and go, and come back under another id, while a run lasts."""
        return False


@dataclass(frozen=True, kw_only=True)
class LocalLauncher(Launcher):
    """All clients one after another on one resident base model.

    threads: torch.set_num_threads; null = torch's own choice. isolate: the clients work in one worker process, which is ended and
    started anew where a client dies or passes trainer.federated.round_timeout; else in this process. start_timeout: seconds until
    the worker must be ready; it acts with isolate only.
    """

    threads: int | None = 2
    isolate: bool = False
    start_timeout: float = START_TIMEOUT

    @property
    def clock(self) -> Literal["round", "client", "none"]:
        """A call in this process cannot be timed out; and clients that wait for their turn are never late."""
        return "client" if self.isolate else "none"

    def __post_init__(self) -> None:
        _check_threads(self.threads)
        if not 0 < self.start_timeout <= LARGEST:
            raise UserError(f"launcher.start_timeout={self.start_timeout} must be above 0 seconds, at most 1e6")
        if not self.isolate and self.start_timeout != START_TIMEOUT:
            raise UserError(
                f"launcher.start_timeout={self.start_timeout} has nothing to act on: without a worker process only the default "
                f"{START_TIMEOUT} is allowed. Leave it out, or set launcher.isolate=true"
            )


@dataclass(frozen=True, kw_only=True)
class RayLauncher(Launcher):
    """Flower's simulation engine on Ray, in a child process group under a deadline.

    client_cpus, client_gpus: resources of one actor (an actor holds one base model). start_timeout: seconds until the actors
    must be up. address: a running Ray cluster; null = a cluster of its own on this machine.
    """

    threads: int | None = 2
    client_cpus: float = 2.0
    client_gpus: float = 0.0
    start_timeout: float = 120.0
    address: str | None = None

    @property
    def survives_lost_clients(self) -> bool:
        """A dead actor poisons the engine's pool and a hung one never returns: either ends the run."""
        return False

    def __post_init__(self) -> None:
        _check_threads(self.threads)
        if self.client_cpus <= 0 or self.client_gpus < 0 or not 0 < self.start_timeout <= LARGEST:
            raise UserError(
                f"launcher: client_cpus={self.client_cpus} and start_timeout={self.start_timeout} must be above 0 (start_timeout at most 1e6), client_gpus={self.client_gpus} not below"
            )


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UserError(f"launcher.threads={threads} must be at least 1, or null for torch's own choice")
