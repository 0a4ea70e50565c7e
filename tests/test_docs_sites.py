"""docs/sites.md: its tables have the keys that a YAML may have."""

import dataclasses
import re
from pathlib import Path

import pytest

from fedunlearn.config.sites import ClientSite, Policy, ServerSite

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "sites.md").read_text()


@pytest.mark.parametrize(
    ("title", "kind"),
    [("The server's YAML", ServerSite), ("A client's YAML", ClientSite), ("The policy's YAML", Policy)],
)
def test_each_key_is_explained(title, kind):
    section = TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]
    keys = [key for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
    assert sorted(keys) == sorted(field.name for field in dataclasses.fields(kind))
