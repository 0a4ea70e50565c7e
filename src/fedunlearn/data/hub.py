"""Rows of data sets, for every benchmark: from the hub through `datasets`, or from files of JSON lines, JSON lists and parquet."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedunlearn.errors import UserError

RawRow = Mapping[str, object]
HUB_TIMEOUT_SECONDS = 10.0
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class HubSplit:
    """One split on the hub. key: what the config calls the data set, for messages. shown: the name of the split there; empty: the config's."""

    key: str
    name: str
    config: str
    split: str
    shown: str = ""

    @property
    def told(self) -> str:
        """What messages call it."""
        return self.shown or self.config


def load_split(wanted: HubSplit, online: bool) -> tuple[RawRow, ...]:
    """Downloads the split, or takes it from the cache; raises UserError without network and cache, or without such a split.

    online: whether the hub answered before; where not, only the cache is looked at.
    """
    import datasets

    try:
        with _offline(not online):
            rows = datasets.load_dataset(wanted.name, name=wanted.config, split=wanted.split).to_list()
    except ConnectionError as error:
        raise _unreachable(wanted) from error
    except (ValueError, FileNotFoundError) as error:
        raise UserError(
            f"{wanted.key}={wanted.name!r} has no readable split {wanted.told!r} ({error}); choose a split that it has, or another {wanted.key}"
        ) from error
    return tuple(rows)


def hub_has(key: str, name: str, layout: str) -> bool:
    """Asks the hub once, so that a missing network costs no 23 s of retries; False where it cannot be reached.

    layout: what a folder holds and what a hub id looks like, for messages. Raises UserError where the hub has no such data set.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{key}={name!r} is neither a folder here nor a data set on the hub that you may read; give a folder with {layout}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"{key}={name!r}: the hub answers with an error ({error}); try again later, or give a local folder"
        ) from error
    except Exception as error:
        if not _is_network_fault(error):
            raise
        return False
    return True


def read_rows(path: Path) -> tuple[RawRow, ...]:
    """Gives the rows of a file of JSON lines, or of one JSON list. Raises UserError where it is neither, or holds no row."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except ValueError as error:
        raise UserError(
            f"{path} is neither JSON lines nor a JSON list ({error}); fetch the file again, or correct it"
        ) from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"{path}: expected one JSON object a row, and at least one row; fetch the file again, or correct it"
        )
    return tuple(rows)


def read_parquet(paths: Sequence[Path]) -> tuple[RawRow, ...]:
    """Gives the rows of parquet files, one after the other. Raises UserError where one cannot be read, or there is no row."""
    import datasets

    try:
        # its cache would keep a copy under the files' names, and hand it out when they have changed
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.Dataset.from_parquet([str(path) for path in paths], cache_dir=cache).to_list()
    except Exception as error:  # pyarrow's errors and those that datasets wraps them in have no base of their own
        raise UserError(f"{paths[0]} is no parquet file that can be read ({error}); fetch the file again") from error
    if not rows:
        raise UserError(f"{paths[0]}: expected at least one row; fetch the file again")
    return tuple(rows)


def _is_network_fault(error: BaseException) -> bool:
    """Offline mode, no route, no name, timeout. The HTTP client's own classes differ from version to version, so names are looked at."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OfflineModeIsEnabled", "ConnectionError", "TransportError", "TimeoutError"})


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Lets `datasets` look at its cache only, without retries, while the hub is known not to answer."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _unreachable(wanted: HubSplit) -> UserError:
    return UserError(
        f"{wanted.key}={wanted.name!r}: split {wanted.told!r} is not in the cache and the hub cannot be reached (no network, or HF_HUB_OFFLINE=1); "
        f"connect once, or set {wanted.key} to a local folder that holds {'<subset>/' if wanted.shown else ''}<split>.json"
    )
