"""Records of the groups `aggregation` and `gate`: what the server makes of a round."""

from dataclasses import dataclass
from typing import Literal

from fedunlearn.aggregation.names import ClientWeights, GaugeName, Mask, ReducerName, Residual
from fedunlearn.errors import UserError
from fedunlearn.limits import LARGEST


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """Five choices that together are the published ways to average LoRA.

    weights: a client's share by rows `owned` (declared at the roll call, the same in every round), rows `trained` this round, `uniform`, or
    `product_norm` (||s_k B_k A_k||). mask: which factors clients train: `both`, `b`, or `alternate` (B in odd rounds, A in even ones).
    reducer: `factors`, `padded_factors`, `trimmed_mean`, `product` (best rank r of the exact mean), `stack`. residual: what the factors miss
    is `dropped`, kept in a frozen `sidecar`, or handed on as `feedback`. gauge: `as_is`, `balanced`, `orthonormal`, `procrustes`, `reset`.
    softness: of procrustes, in (0, 1]. trim: share left out at each end by trimmed_mean, in (0, 0.5). sidecar_rank: rank the side-car is
    recompressed to each round; null: it grows, exact. export_rank: the result holds the side-car too as one `exact` stack, or is the best
    rank `r` of it.
    """

    weights: ClientWeights = "owned"
    mask: Mask = "both"
    reducer: ReducerName = "factors"
    residual: Residual = "dropped"
    gauge: GaugeName = "as_is"
    softness: float | None = None
    trim: float | None = None
    sidecar_rank: int | None = None
    export_rank: Literal["exact", "r"] = "exact"

    def __post_init__(self) -> None:
        faults = [fault for holds, fault in self._rules() if not holds]
        if faults:
            raise UserError(*faults)

    def _rules(self) -> list[tuple[bool, str]]:
        at = "aggregation."
        return [
            (
                (self.softness is not None) == (self.gauge == "procrustes"),
                f"{at}softness={self.softness} beside {at}gauge={self.gauge}: it is the softness of procrustes, wanted there (0.5 in FedRot) and null elsewhere",
            ),
            (
                self.softness is None or 0 < self.softness <= 1,
                f"{at}softness={self.softness} must lie in (0, 1]: 1 turns all the way",
            ),
            (
                (self.trim is not None) == (self.reducer == "trimmed_mean"),
                f"{at}trim={self.trim} beside {at}reducer={self.reducer}: it is what trimmed_mean leaves out at each end, wanted there and null elsewhere",
            ),
            (self.trim is None or 0 < self.trim < 0.5, f"{at}trim={self.trim} must lie in (0, 0.5)"),
            (
                self.sidecar_rank is None or self.residual == "sidecar",
                f"{at}sidecar_rank={self.sidecar_rank} beside {at}residual={self.residual}: there is no side-car; set residual=sidecar or leave it null",
            ),
            (
                self.sidecar_rank is None or self.sidecar_rank > 0,
                f"{at}sidecar_rank={self.sidecar_rank} must be at least 1, or null (exact: it grows)",
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What one client may do at most.

    max_norm_ratio: an update's norm over the median of the others in its role, from three in a role on (null: no bound): of the product and of
    the factors by themselves.
    max_update_ratio: the norm of what a client changed in A and B over that of the A and B it was sent, however few clients there are (null: no
    bound).
    max_client_share: a client's share of the mean, from three clients on, or 1/K where K equal shares are larger (null: no cap). It acts before
    robust weights: whom Krum or Multi-Krum chooses counts for what it gives, and a note in the history says so where that passes the cap.
    max_reply_ratio: bytes of a reply over those of the adapter that is awaited; a little is added for headers.
    """

    max_norm_ratio: float | None = 10.0
    max_update_ratio: float | None = 10.0
    max_client_share: float | None = 0.5
    max_reply_ratio: float = 1.5

    def __post_init__(self) -> None:
        at = "gate."
        rules = [
            (
                self.max_norm_ratio is None or 1 < self.max_norm_ratio <= LARGEST,
                f"{at}max_norm_ratio={self.max_norm_ratio} must be above 1 (the median itself), at most 1e6, or null for no bound",
            ),
            (
                self.max_update_ratio is None or 0 < self.max_update_ratio <= LARGEST,
                f"{at}max_update_ratio={self.max_update_ratio} must be above 0 (1 is as much as the adapter itself), at most 1e6, or null for no bound",
            ),
            (
                self.max_client_share is None or 0 < self.max_client_share <= 1,
                f"{at}max_client_share={self.max_client_share} must lie in (0, 1], or null for no cap",
            ),
            (
                1 <= self.max_reply_ratio <= LARGEST,
                f"{at}max_reply_ratio={self.max_reply_ratio} must be at least 1, at most 1e6",
            ),
        ]
        faults = [fault for holds, fault in rules if not holds]
        if faults:
            raise UserError(*faults)
