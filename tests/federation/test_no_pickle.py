"""Nothing that a run leaves on disk, and nothing that it sends, is pickle: pickled bytes are code for whoever reads them."""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.common.serde import message_to_proto
from helpers_runs import finetune, unlearn

from fedunlearn.federation.launchers import local
from fedunlearn.federation.local_grid import LocalGrid

PROTO, ZIP, NUMPY = b"\x80", b"PK\x03\x04", b"\x93NUMPY"
FEW = 4
"""Lines of what random bytes come apart into, should they ever: mark, value, stop, and the line below."""
EXPORTED = (".safetensors", ".json", ".jsonl", ".yaml", ".txt", ".jinja", ".lock")
"""Endings of what a run and its caches may consist of; TensorBoard's own events are protobuf and have none."""


def pickled_at(data: bytes) -> str:
    """Says what in these bytes is pickle, or an archive of torch's, or numpy's own format; empty where nothing is.

    A stream of protocol 2 and later says so in its first two bytes; it counts where pickletools takes it apart through to its STOP, the stack in
    order all the way. Protocols 0 and 1 have no mark: whole files and messages are read as such from their first byte.
    """
    if data.startswith(ZIP):
        return "a zip archive"
    if NUMPY in data:
        return "numpy's format"
    marks = [at for at in range(len(data)) if data[at : at + 1] == PROTO and data[at + 1 : at + 2] in b"\2\3\4\5"]
    found = next((at for at in (0, *marks) if _comes_apart(data[at:])), None)
    return "" if found is None else f"a pickle at byte {found}"


def _comes_apart(data: bytes) -> bool:
    """Whether a pickle begins here that does more than give one number or text."""
    lines = io.StringIO()
    try:
        pickletools.dis(data, out=lines)
    except Exception:  # it raises whatever the bytes lead it to
        return False
    return lines.getvalue().count("\n") > FEW


@pytest.fixture(scope="module")
def sent() -> list[bytes]:
    """Every message that the grids carried, as Flower's protobuf."""
    return []


@pytest.fixture(scope="module")
def saves(pocket, tmp_path_factory, sent) -> Path:
    """A saves folder with a fine-tuning run and one that unlearns from it, caches included."""

    class Listening(LocalGrid):
        def _answer(self, message):
            reply = super()._answer(message)
            sent.extend(message_to_proto(one).SerializeToString() for one in (message, reply))
            return reply

    saves = tmp_path_factory.mktemp("pickles") / "saves"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "LocalGrid", Listening)
        every = ("eval.clients_every_n_rounds=1", "eval.client_rows=2")
        start = finetune(pocket, saves, "ft", "strategy=fedadam", "ledger.enabled=true", *every)
        unlearn(pocket, saves, start, "un", "method=npo", "aggregation=flora", "protocol=all_clients", "protocol.released=true", "eval.at_end=true", *every)  # fmt: skip
    return saves


def test_no_file_of_a_run_or_its_caches_is_pickle(saves):
    files = [path for path in saves.rglob("*") if path.is_file()]
    places = {path.relative_to(saves).parts[0] for path in files}
    assert {"finetune", "unlearn", "cache"} <= places
    assert len(files) > 30
    assert {str(path): told for path in files if (told := pickled_at(path.read_bytes()))} == {}
    odd = [path for path in files if path.suffix not in EXPORTED and "tfevents" not in path.name]
    assert odd == []


def test_no_message_is_pickle(saves, sent):
    assert (
        len(sent) >= 2 * (4 + 4 * 2 + 4 * 2) * 2
    )  # query, train and evaluate, there and back, of four clients in two runs
    assert any(b"safetensors" in one for one in sent)
    assert [told for one in sent if (told := pickled_at(one))] == []


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_found(protocol, tmp_path):
    data = pickle.dumps({"a": [1, 2.0, "x"]}, protocol)
    assert pickled_at(data) == "a pickle at byte 0"
    if protocol >= 2:
        assert pickled_at(b"something before it " + data) == "a pickle at byte 20"


def test_what_torch_and_numpy_save_is_found(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "new.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object))
    assert zipfile.is_zipfile(tmp_path / "new.pt")
    found = {path.name: pickled_at(path.read_bytes()).split(" at ")[0] for path in tmp_path.iterdir()}
    assert found == {"new.pt": "a zip archive", "old.pt": "a pickle", "a.npy": "numpy's format"}
    assert pickled_at(b'{"a": 1}') == pickled_at(b"") == ""
