"""by_method: what the method asks for."""

from dataclasses import dataclass

from fedunlearn.protocols.in_round import InRound


@dataclass(frozen=True, kw_only=True)
class ByMethod(InRound):
    """in_round for a local method; a server-side method says itself who works, and goes with no other protocol."""
