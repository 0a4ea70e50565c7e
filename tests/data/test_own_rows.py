"""One client's own rows as a folder: the same examples under the same numbers, and nothing of anybody else."""

import json

import pytest
from helpers_runs import tiny

from fedunlearn.data.opened import open_tofu
from fedunlearn.data.own_rows import write_own
from fedunlearn.data.ownership import make_partition
from fedunlearn.data.tofu import load_tofu
from fedunlearn.doors.own_rows import split_off
from fedunlearn.errors import UserError


@pytest.fixture
def dealt(pocket, tmp_path):
    tofu = load_tofu(str(pocket.data))
    run = tiny(pocket, tmp_path, "finetune", "x").run
    return tofu, make_partition(run.partition, tofu, 4)


def test_the_same_rows_under_the_same_numbers(dealt, tmp_path):
    tofu, partition = dealt
    write_own(tofu, partition, 2, tmp_path / "own")
    own = open_tofu(str(tmp_path / "own"), tmp_path)
    assert [own.row(number) for number in partition.clients[2]] == [tofu.row(number) for number in partition.clients[2]]
    assert (own.num_rows, own.hash("full"), own.rows_per_author) == (
        tofu.num_rows,
        tofu.hash("full"),
        tofu.rows_per_author,
    )
    others = [tofu.row(number).answer for client in (0, 1, 3) for number in partition.clients[client]]
    written = "".join(path.read_text() for path in (tmp_path / "own").iterdir())
    assert not [answer for answer in others if answer in written]


def test_what_is_not_held_is_named(dealt, tmp_path):
    tofu, partition = dealt
    write_own(tofu, partition, 0, tmp_path / "own")
    own = open_tofu(str(tmp_path / "own"), tmp_path)
    with pytest.raises(UserError, match=f"does not hold row {partition.clients[1][0]} of full"):
        own.row(partition.clients[1][0])
    with pytest.raises(UserError, match="holds one client's own rows, no split 'forget10'"):
        own.rows("forget10")
    with pytest.raises(UserError, match="holds one client's own rows, no split 'full'"):
        own.rows("full")


def test_rows_that_were_changed_are_refused(dealt, tmp_path):
    tofu, partition = dealt
    write_own(tofu, partition, 0, tmp_path / "own")
    path = tmp_path / "own" / "full.json"
    row, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([row.replace("?", "!"), *others]))
    with pytest.raises(UserError, match=r"is not the one that own\.json was written for"):
        open_tofu(str(tmp_path / "own"), tmp_path)
    (tmp_path / "own" / "own.json").write_text("{")
    with pytest.raises(UserError, match=r"own\.json is damaged"):
        open_tofu(str(tmp_path / "own"), tmp_path)


def test_what_cannot_be_split_off_is_refused_and_nothing_is_left(dealt, pocket, tmp_path):
    tofu, partition = dealt
    with pytest.raises(UserError, match="--client 4: the partition has clients 0 to 3"):
        write_own(tofu, partition, 4, tmp_path / "own")
    assert not (tmp_path / "own").exists()
    saved = {"clients": [[0, 1, 2, 3]], "rows_per_author": 4, "data_hash": "other", "scheme": {}}
    (tmp_path / "partition.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="was made for other data"):
        split_off(str(pocket.data), tmp_path / "partition.json", 0, tmp_path / "own")
    with pytest.raises(UserError, match="is there already"):
        split_off(str(pocket.data), tmp_path / "partition.json", 0, tmp_path)
