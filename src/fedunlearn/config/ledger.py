"""The record of the group `ledger`."""

from dataclasses import dataclass

from fedunlearn.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LedgerConfig:
    """Whether every accepted update of every round is kept, for server-side methods to work on.

    max_bytes: a run whose ledger would need more, by the sizes of adapter and cohort, is refused before training. purge: when a request is done, the
    tensors of its owners are deleted from the ledgers of this run and of those it goes on from; hashes and norms stay.
    """

    enabled: bool = False
    max_bytes: int = 4_000_000_000
    purge: bool = True

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise UserError(f"ledger.max_bytes={self.max_bytes} must be at least 1 (ledger.enabled=false keeps none)")
