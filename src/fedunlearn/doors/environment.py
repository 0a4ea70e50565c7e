"""Environment variables that must stand before torch, Flower or the tokenizers are imported."""

import os
from collections.abc import Mapping

DEFAULTS: Mapping[str, str] = {
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads beside another busy process are 3-16 times slower
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def set_environment() -> None:
    """Sets what the user has not set; to be called before the first import of torch."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
