"""The benchmark of registered clients at tiny sizes: it runs, its rows are shared there alone, and missed bounds are told."""

import io
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import scale
import scale_run
from helpers_runs import finetune
from scale import Measured
from scale_run import Shared, Size

from fedunlearn.errors import UserError
from fedunlearn.federation.checkpoint import read_history

SHARED = f"partition.scheme={{_target_: scale_run.{Shared.__name__}}}"


@pytest.fixture
def size(pocket, tmp_path):
    """Thirty clients of the tiny pocket's twenty authors, three of them drawn in each of three rounds."""
    saves = str(tmp_path / "many")
    return Size(population=30, cohort=3, rounds=3, data=str(pocket.data), model=str(pocket.model), saves=saves)


def test_every_client_has_equally_many_authors_and_authors_several_clients():
    """30 clients with 2 of 20 authors each: 60 places, 3 an author."""
    dealt = Shared().deal(20, 30)
    assert {len(set(authors)) for authors in dealt} == {2}
    assert Counter(author for authors in dealt for author in authors) == dict.fromkeys(range(20), 3)
    assert dealt != Shared(seed=1).deal(20, 30)


def test_a_run_waits_before_each_round_and_tells_what_it_took(size, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n" * size.rounds))
    scale_run.make_folder(size)
    scale_run.serve(size)
    *waits, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert [set(wait) for wait in waits] == [{"seconds", "cpu"}] * size.rounds
    assert min(wait["cpu"] for wait in waits) > 0
    assert last["mib"] > 0
    assert sys.stdin.read() == ""
    folder = Path(size.saves) / "finetune" / "30-3"
    assert len(json.loads((folder / "roll_call.json").read_text())["members"]) == size.population
    lines = read_history(folder)
    assert [[client["num_examples"] for client in line["clients"]] for line in lines] == [[8] * 3] * size.rounds


def test_doors_refuse_rows_with_two_owners(size, pocket, saves):
    with pytest.raises(
        UserError, match=r"partition.scheme=.*Shared.* gives a row to two clients: every row has one owner"
    ):
        finetune(pocket, saves, "shared", SHARED, "trainer.federated.num_clients=15")
    with pytest.raises(UserError, match=r"num_clients=30 exceeds the 20 authors"):
        finetune(pocket, saves, "shared", SHARED, "trainer.federated.num_clients=30")
    scale_run.make_folder(size)
    file = f"partition.path={size.saves}/finetune/30-3/partition.json"
    with pytest.raises(UserError, match="the partition gives a row to two clients: every row has one owner"):
        finetune(pocket, saves, "shared", "partition=inherit", file, "trainer.federated.num_clients=30")
    assert not (saves / "finetune").exists()


def test_missed_bounds_are_told():
    """Ratios 1.2, 1.0 and 1.3 of single rounds, of which the median counts; 2,000 bytes a client are 1.907 MiB over 1,000."""
    first = Measured(
        population=10, cohort=2, roll_call=9.0, roll_call_wall=9.0, cpu=(1.0, 2.0, 1.0), seconds=(), mib=100.0
    )
    last = replace(first, population=1_010, roll_call=2.9, cpu=(1.0, 2.2, 1.3), mib=101.9)
    assert scale.faults([first, last]) == []
    missed = replace(last, roll_call=3.1, cpu=(1.2, 2.0, 1.3), mib=102.0)
    assert [fault.split(": ")[1].split(" ")[0] for fault in scale.faults([first, missed])] == ["a", "the", "2097"]


@pytest.mark.slow
def test_it_runs_and_its_exit_code_says_whether_all_bounds_hold(monkeypatch, capsys):
    """Forty registered clients cannot tell the bytes of one; ratio and roll call are there."""
    command = ["scale.py", "--json", "--rounds", "3", "--populations", "10", "40", "--cohorts", "2"]
    monkeypatch.setattr(sys, "argv", command)
    code = scale.main()
    told = json.loads(capsys.readouterr().out)
    assert code == (1 if told["faults"] else 0)
    assert [run["population"] for run in told["populations"]] == [10, 40]
    assert [run["cohort"] for run in told["cohorts"]] == [2]
    assert 0.2 < told["ratio"] < 5
