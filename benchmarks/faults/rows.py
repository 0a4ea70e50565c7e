"""The rows of the matrix: every strategy and every way to aggregate, as overrides of one small run."""

from dataclasses import dataclass
from typing import Literal

Dense = Literal["factors", "product", "best rank", "median", "trimmed"]
FLOWER = "strategy._target_=flwr.serverapp.strategy."
RANKS = "partition.ranks=[4,2,2,1,4,3,3]"
UNIFORM_B = ("aggregation.mask=b", "aggregation.weights=uniform")


@dataclass(frozen=True)
class Row:
    """dense: what the mean of the first round is, where a few lines of dense float64 say it; else None."""

    name: str
    group: str
    overrides: tuple[str, ...]
    dense: Dense | None = None

    @property
    def reads_loss(self) -> bool:
        """Whether the strategy weighs clients by the loss that they tell."""
        return self.name == "QFedAvg"


def _row(group: str, name: str, dense: Dense | None, *overrides: str) -> Row:
    return Row(name, group, overrides, dense)


OURS, PRESETS, OWN_RANKS, ROBUST, FLOWERS = "strategies", "aggregation", "own ranks", "robust", "Flower's"
ROWS: tuple[Row, ...] = (
    _row(OURS, "fedavg", "factors", "strategy=fedavg"),
    _row(OURS, "fedprox", "factors", "strategy=fedprox"),
    _row(OURS, "fedavgm", None, "strategy=fedavgm"),
    _row(OURS, "fedadagrad", None, "strategy=fedadagrad"),
    _row(OURS, "fedadam", None, "strategy=fedadam"),
    _row(OURS, "fedyogi", None, "strategy=fedyogi"),
    _row(PRESETS, "fedit", "factors", "aggregation=fedit"),
    _row(PRESETS, "ffa", "factors", "aggregation=ffa"),
    _row(PRESETS, "rolora", "factors", "aggregation=rolora"),
    _row(PRESETS, "fedex", "product", "aggregation=fedex"),
    _row(PRESETS, "flora", "product", "aggregation=flora"),
    _row(PRESETS, "flexlora", "best rank", "aggregation=flexlora"),
    _row(PRESETS, "hetlora", "factors", "aggregation=hetlora"),
    _row(PRESETS, "fedrot", None, "aggregation=fedrot"),
    _row(PRESETS, "fedsvd", "product", "aggregation=fedsvd"),
    _row(PRESETS, "flexlora, feedback", "best rank", "aggregation=flexlora", "aggregation.residual=feedback"),
    _row(OWN_RANKS, "flora, ranks", "product", "aggregation=flora", RANKS),
    _row(OWN_RANKS, "flexlora, ranks", "best rank", "aggregation=flexlora", RANKS),
    _row(OWN_RANKS, "hetlora, ranks", "factors", "aggregation=hetlora", RANKS),
    _row(ROBUST, "norm_clipping", None, "robust=norm_clipping"),
    _row(ROBUST, "krum", None, "robust=krum"),
    _row(ROBUST, "multi_krum", None, "robust=multi_krum"),
    _row(ROBUST, "geometric_median", None, "robust=geometric_median"),
    _row(ROBUST, "trimmed_mean", "trimmed", *UNIFORM_B, "aggregation.reducer=trimmed_mean", "aggregation.trim=0.2"),
    _row(FLOWERS, "FedAvg", "factors", f"{FLOWER}FedAvg"),
    _row(FLOWERS, "FedAvgM", None, f"{FLOWER}FedAvgM", "strategy.server_momentum=0.9"),
    _row(FLOWERS, "FedAdam", None, f"{FLOWER}FedAdam", "strategy.eta=0.001"),
    _row(FLOWERS, "Krum", None, f"{FLOWER}Krum", "strategy.num_malicious_nodes=1"),
    _row(FLOWERS, "FedMedian", "median", f"{FLOWER}FedMedian"),
    _row(FLOWERS, "FedTrimmedAvg", "trimmed", f"{FLOWER}FedTrimmedAvg", "strategy.beta=0.2"),
    _row(FLOWERS, "QFedAvg", None, f"{FLOWER}QFedAvg", "strategy.client_learning_rate=0.1"),
)  # fmt: skip
