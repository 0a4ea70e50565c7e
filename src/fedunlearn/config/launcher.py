"""Records of the `launcher` group: where the clients run."""

from dataclasses import dataclass
from typing import Literal, cast

from fedunlearn.config.addresses import Address, parse_address
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
    def submits(self) -> bool:
        """Whether the run is handed to a server elsewhere, which prepares and ends it too."""
        return False

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

    client_cpus, client_gpus: resources of one actor (an actor holds one base model); there are as many actors as fit. start_timeout: seconds
    until the cluster must have let this process in, have room for the actors, and every node must have answered. address: host:port of the
    head of a running Ray cluster that this machine belongs to; null = a cluster of its own on this machine. min_nodes: how many nodes of that
    cluster must be there before the run begins.
    """

    threads: int | None = 2
    client_cpus: float = 2.0
    client_gpus: float = 0.0
    start_timeout: float = 120.0
    address: str | None = None
    min_nodes: int = 1

    @property
    def survives_lost_clients(self) -> bool:
        """A dead actor poisons the engine's pool and a hung one never returns: either ends the run."""
        return False

    def __post_init__(self) -> None:
        _check_threads(self.threads)
        faults = []
        if self.address is not None and parse_address(self.address) is None:
            faults.append(
                f"launcher.address={self.address!r} is no address of a Ray cluster: give host:port of its head as `ray start --head --port=...` has it, as in 10.0.0.1:6379 (no "
                "ray://, no auto), or null for a cluster of its own on this machine"
            )
        if self.min_nodes < 1 or (self.address is None and self.min_nodes > 1):
            faults.append(
                f"launcher.min_nodes={self.min_nodes} must be at least 1, and 1 without launcher.address: a cluster of its own is this machine alone"
            )
        if not self.client_cpus > 0 or not self.client_gpus >= 0:
            faults.append(
                f"launcher.client_cpus={self.client_cpus} must be above 0, launcher.client_gpus={self.client_gpus} not below"
            )
        faults += [
            f"launcher.{key}={value}: Ray gives away whole ones or a part of one; give a whole number, or one below 1"
            for key, value in (("client_cpus", self.client_cpus), ("client_gpus", self.client_gpus))
            if value > 1 and value != value // 1
        ]
        if not 0 < self.start_timeout <= LARGEST:
            faults.append(f"launcher.start_timeout={self.start_timeout} must be above 0 seconds, at most 1e6")
        if faults:
            raise UserError(*faults)


@dataclass(frozen=True, kw_only=True)
class SuperlinkLauncher(Launcher):
    """A run handed to a SuperLink: server and clients are other processes, mostly on other machines.

    address: host:port of the SuperLink's Control API. root_certificates: PEM file its certificate is checked against; null with insecure only.
    insecure: no TLS; on loopback alone. start_timeout: seconds for which a SuperLink that has taken the run may be silent before the submitter gives up.
    """

    threads: int | None = 2
    address: str
    root_certificates: str | None = None
    insecure: bool = False
    start_timeout: float = START_TIMEOUT

    @property
    def nodes_change(self) -> bool:
        """A node that was started again has another id."""
        return True

    @property
    def superlink(self) -> Address:
        """The address, read."""
        return cast("Address", parse_address(self.address))

    @property
    def submits(self) -> bool:
        """The whole stage is the server's work."""
        return True

    def __post_init__(self) -> None:
        _check_threads(self.threads)
        faults = []
        address = parse_address(self.address)
        if address is None:
            faults.append(f"launcher.address={self.address!r} is no address: give host:port, as in 127.0.0.1:8000")
        elif self.insecure and not address.is_loopback:
            faults.append(
                f"launcher.insecure=true goes with loopback only, launcher.address={self.address!r} is not: use TLS"
            )
        if self.insecure == (self.root_certificates is not None):
            faults.append(
                "launcher.root_certificates: give the PEM file that the SuperLink's certificate is checked against, or launcher.insecure=true on this machine "
                "alone; one of the two"
            )
        if not 0 < self.start_timeout <= LARGEST:
            faults.append(f"launcher.start_timeout={self.start_timeout} must be above 0 seconds, at most 1e6")
        if faults:
            raise UserError(*faults)


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise UserError(f"launcher.threads={threads} must be at least 1, or null for torch's own choice")
