"""The fault matrix: every strategy and preset under every fault of one client in seven. See benchmarks/fault_matrix.py.

Environment variables are set here, for some must be before torch and Flower are imported.
"""

import os

_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TTY_COMPATIBLE": "0",  # five thousand progress bars
}
for _key, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_key, _value)
