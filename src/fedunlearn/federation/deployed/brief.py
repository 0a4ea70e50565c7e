"""What passes between the processes of a run over a SuperLink, beside its rounds. Knows no torch.

It is the submitted config, the lines told to the submitter, and what a node is told at the roll call in place of the run's folder that clients of one machine
read.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flwr.app import ConfigRecord, RecordDict

BRIEF = "brief"
CONFIG_KEY = "config-json"
"""Of a submitted run's config: the composed config, as one JSON string."""
TOLD = "fedunlearn> "
"""Begins each line of the run's log that the submitter reads."""
GO_ON = "the same command with resume=true goes on where its last whole round ended"
"""The way out where a run ended for another reason than its config."""
LONGEST_BRIEF = 16 * 2**20
"""Characters: the row numbers of two million rows."""


@dataclass(frozen=True, kw_only=True)
class Brief:
    """version: of the server's package. config: of the run, for clients (JSON values). partition, request: the texts of partition.json and request.json."""

    version: str
    config: Mapping[str, Any]
    partition: str
    request: str


def pack_brief(brief: Brief) -> RecordDict:
    """Gives the content of a roll call's query."""
    return RecordDict({BRIEF: ConfigRecord({"json": json.dumps(asdict(brief), sort_keys=True)})})


def unpack_brief(content: RecordDict) -> Brief:
    """Reads it again. Raises ValueError for anything else."""
    record = content.get(BRIEF)
    text = record.get("json") if isinstance(record, ConfigRecord) else None
    if not isinstance(text, str):
        raise ValueError("the roll call holds no brief of a run")
    if len(text) > LONGEST_BRIEF:
        raise ValueError(f"the brief of the run has {len(text)} characters, at most {LONGEST_BRIEF} are read")
    try:
        data = json.loads(text)
        brief = Brief(**data)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the brief of the run cannot be read ({type(error).__name__})") from error
    texts = (brief.version, brief.partition, brief.request)
    if not all(isinstance(text, str) for text in texts) or not isinstance(brief.config, dict):
        raise ValueError("the brief of the run holds values of other types")
    return brief
