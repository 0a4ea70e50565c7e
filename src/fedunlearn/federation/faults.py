"""Why a client gave no usable reply: the error codes that our grids give, and the word that a line of history has for each."""

from collections.abc import Mapping
from types import MappingProxyType

CLIENT_RAISED = 1001
CLIENT_TIMEOUT = 1002
CLIENT_DIED = 1003
REPLY_TOO_LARGE = 1004
REPLY_UNREADABLE = 1005

REASON_OF_CODE: Mapping[int, str] = MappingProxyType(
    {
        CLIENT_RAISED: "crashed",
        CLIENT_TIMEOUT: "timeout",
        CLIENT_DIED: "crashed",
        REPLY_TOO_LARGE: "wire_size",
        REPLY_UNREADABLE: "unreadable",
    }
)
"""Codes that are not here come from Flower or from a ClientApp of somebody else."""

LOST = ("crashed", "timeout")
"""Words for a client that is gone, or was when it was asked; all others say that there is something wrong with its reply."""
