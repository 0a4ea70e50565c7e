"""Records of the `launcher` group: where the clients run."""

from dataclasses import dataclass

from fedunlearn.errors import UserError


class Launcher:
    """Where the ClientApp runs. One record a launcher; fedunlearn.federation.launchers knows how to start each."""

    @property
    def survives_lost_clients(self) -> bool:
        """Whether a round can go on when a client raised or fell silent; else that ends the run with an error."""
        return True

    @property
    def keeps_time(self) -> bool:
        """Whether trainer.federated.round_timeout acts: only where a client's work can be left waiting."""
        return True


@dataclass(frozen=True, kw_only=True)
class LocalLauncher(Launcher):
    """All clients in this process, one after another, on one resident base model. threads: torch.set_num_threads; null = torch's own choice."""

    threads: int | None = 2

    @property
    def keeps_time(self) -> bool:
        """A call in this process cannot be timed out, and clients that wait for their turn are not late."""
        return False

    def __post_init__(self) -> None:
        _check_threads(self.threads)


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
        if self.client_cpus <= 0 or self.client_gpus < 0 or self.start_timeout <= 0:
            raise UserError(
                f"launcher: client_cpus={self.client_cpus} and start_timeout={self.start_timeout} must be above 0, client_gpus={self.client_gpus} not below"
            )


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UserError(f"launcher.threads={threads} must be at least 1, or null for torch's own choice")
