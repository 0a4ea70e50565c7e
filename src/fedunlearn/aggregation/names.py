"""The names that the configuration chooses from."""

from typing import Literal

ClientWeights = Literal["owned", "trained", "uniform", "product_norm"]
Mask = Literal["both", "b", "alternate"]
ReducerName = Literal["factors", "padded_factors", "trimmed_mean", "product", "stack"]
Residual = Literal["dropped", "sidecar", "feedback"]
GaugeName = Literal["as_is", "balanced", "orthonormal", "procrustes", "reset"]
