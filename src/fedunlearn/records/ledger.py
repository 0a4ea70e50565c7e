"""One line of a ledger."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from fedunlearn.files import canonical_json

GLOBAL = -1


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """What one line says; its tensors lie beside it.

    kind: `update` (what a client sent: the factors it trained), `global` (the adapter that a round began with, client_id -1), `parent` (the ledger
    this one goes on from: tensors is its head). weight: the client's share p_k of the round's mean. norms: ||U_k|| of the product update by module
    name, which stay when tensors are purged. tensors: sha256 of them. previous, hash: the chain, each line's hash over all that stands before it.
    """

    kind: Literal["update", "global", "parent"]
    round: int
    client_id: int
    tensors: str
    previous: str
    role: str = ""
    weight: float = 0.0
    num_examples: int = 0
    norms: Mapping[str, float] | None = None
    hash: str = ""

    def sealed(self) -> "LedgerEntry":
        """Gives the entry with its hash."""
        body = {key: value for key, value in asdict(self).items() if key != "hash"}
        return replace(self, hash=hashlib.sha256(canonical_json(body).encode()).hexdigest())
