"""A slice of benchmarks/fault_matrix.py, and that its cells can fail: what the package promises of one client gone wrong."""

import gc
import json
import logging
import shutil
import sys
from dataclasses import replace

import fault_matrix
import pytest
from faults.catalogue import BY_NAME, FAULTS, ROLL_CALL_FAULTS
from faults.cells import ALL, Bench, Cell, all_but, as_seen_by, cells_of
from faults.isolated import real_cells
from faults.recording import Recorded, record
from faults.rows import ROWS
from faults.small_roles import SMALL_ROLES, SmallBench, small_cells_of
from faults.stock import Stock

from fedunlearn.aggregation.gate import Verdict
from fedunlearn.federation import collect, link, turn

GAUGES = ("A a million times B", "B a million times A")
ROW = {row.name: row for row in ROWS}


@pytest.fixture(scope="module")
def place():
    with fault_matrix.scratch() as place:  # in memory: each of thousands of files is flushed
        yield place


@pytest.fixture(scope="module")
def recorded(place) -> Recorded:
    return record(place)


@pytest.fixture
def bench(recorded, place):
    """Gives a row's bench; the gate's warnings are not what these tests look at."""
    logging.disable(logging.WARNING)
    gc.freeze()  # some of Flower's strategies collect garbage once a reply
    yield lambda name, *more: Bench(
        recorded, place / "cells", replace(ROW[name], overrides=(*ROW[name].overrides, *more), dense=None)
    )
    gc.unfreeze()
    logging.disable(logging.NOTSET)


@pytest.fixture
def small(recorded, place):
    """Gives a row's bench of four clients, in a place that is empty."""
    logging.disable(logging.WARNING)
    yield lambda name, *more: SmallBench(recorded, place / "small", ROW[name], more)
    shutil.rmtree(place / "small")
    logging.disable(logging.NOTSET)


def found(bench, *names, called=()):
    """What the cells of these faults say, by name."""
    faults = tuple(BY_NAME[name] for name in names)
    cells = cells_of(bench, faults, tuple(BY_NAME[name] for name in called))
    return {cell.fault: cell.found for cell in cells}


@pytest.mark.parametrize("name", ["flora, ranks", "FedAvgM"])
def test_every_fault_of_one_client_is_as_if_it_had_not_been_there(bench, name):
    """A side-car over clients' own ranks, and a strategy of Flower's that keeps a state: two rounds each."""
    faults = tuple(fault for fault in FAULTS if fault.name not in GAUGES)
    cells = list(cells_of(bench(name), faults, ()))
    assert [(cell.fault, cell.found) for cell in cells if not cell.ok] == []
    assert len(cells) == 2 + len(faults)


def test_every_fault_at_the_roll_call_costs_that_client_its_place_and_nobody_else(bench):
    cells = list(cells_of(bench("fedavgm"), (), ROLL_CALL_FAULTS))
    assert [(cell.fault, cell.found) for cell in cells if not cell.ok] == []


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.dense])
def test_the_first_round_is_what_dense_float64_says(recorded, tmp_path, name):
    """Of all seven, of six, and with one that learnt nothing; the direct computation asserts it."""
    direct = Bench(recorded, tmp_path, ROW[name]).direct
    hashes = [direct.hashes(ALL), direct.hashes(all_but(2)), direct.hashes(ALL, idle=2)]
    assert len({one[0] for one in hashes}) == 3


@pytest.mark.parametrize("name", ["fedavg", "flora, ranks", "krum", "geometric_median", "Krum", "QFedAvg"])
def test_in_roles_of_two_no_fault_moves_the_adapter(small, name):
    """Two owners and two others; QFedAvg, which is refused where clients unlearn, with two that fine-tune."""
    cells = list(small_cells_of(small(name)))
    assert [(cell.fault, cell.found) for cell in cells if not cell.ok] == []
    assert len(cells) == (3 if name == "QFedAvg" else 6)


def test_without_the_bound_on_a_client_by_itself_small_roles_fail(small):
    cells = list(small_cells_of(small("fedavg", "gate.max_update_ratio=null")))
    assert {cell.found for cell in cells} == {"codes ('', '') instead of 'norm'"}


def test_a_loss_that_is_no_number_spoils_the_update_only_where_the_strategy_reads_it(bench):
    assert set(found(bench("QFedAvg"), "loss NaN", "loss 1e308", "loss -7").values()) == {"ok"}
    assert as_seen_by(ROW["QFedAvg"], BY_NAME["loss -7"]).code == "loss"
    assert as_seen_by(ROW["QFedAvg"], BY_NAME["loss NaN"]).code == "nan"
    assert as_seen_by(ROW["FedAvg"], BY_NAME["loss NaN"]).code == ""


@pytest.mark.parametrize("name", GAUGES)
def test_a_gauge_that_takes_over_the_mean_of_factors_does_not_pass(bench, name):
    assert found(bench("fedavg"), name)[name] == "ok"


def test_what_no_sum_can_hold_is_refused_without_a_norm_to_compare_with(bench):
    """One owner alone in its role is not judged by others' norms; its update still must not end the run."""
    alone = bench("flexlora", "gate.max_norm_ratio=null", "gate.max_update_ratio=null")
    assert found(alone, "largest float32")["largest float32"] == "ok"


def test_without_the_gate_the_matrix_fails(bench, monkeypatch):
    monkeypatch.setattr(turn, "check_update", lambda update, expected: Verdict())
    told = found(bench("fedavg"), "NaN", "another base", "num-examples 1e12", "dies", "zero update")
    assert told["NaN"] != "ok"
    assert told["another base"] == "codes ('', '') instead of 'base_mismatch'"
    assert told["num-examples 1e12"] == "codes ('', '') instead of 'num_examples'"
    assert told["dies"] == told["zero update"] == told["none"] == "ok"


def test_without_the_bound_on_norms_the_matrix_fails(bench, monkeypatch):
    monkeypatch.setattr(collect, "judge_norms", lambda norms, ratio: {})
    name = "update 1e6 times too large"
    assert found(bench("fedavg", "gate.max_update_ratio=null"), name)[name] == "codes ('', '') instead of 'norm'"


def test_a_step_that_forgets_a_client_fails_both_references(bench, monkeypatch):
    """The last reply is never counted: the run is consistent with itself, and not with the direct computation."""
    real = turn.TurnReport.merge
    monkeypatch.setattr(
        turn.TurnReport, "merge", lambda self, later: replace(real(self, later), updates=real(self, later).updates[:-1])
    )
    told = found(bench("fedavg"), "dies", "zero update")
    assert told["none"] == told["one missing"] == "another adapter than the direct computation gives"
    assert told["zero update"] == "another adapter in round 1"


def test_a_code_that_is_not_the_fault_s_own_fails(bench):
    wrong = replace(BY_NAME["NaN"], code="shape")
    assert [cell.found for cell in cells_of(bench("fedavg"), (wrong,), ())][
        2
    ] == "codes ('nan', 'nan') instead of 'shape'"


def test_text_that_a_terminal_obeys_fails_a_cell(bench, monkeypatch):
    monkeypatch.setattr(turn, "one_line", str)
    monkeypatch.setattr(link, "one_line", str)
    told = found(bench("fedavg"), "raises, terminal codes", called=("roll call: terminal codes",))
    assert {text for name, text in told.items() if "terminal" in name} == {
        "what the client wrote reaches the log as it is"
    }


def test_a_roll_call_that_lets_everybody_in_fails(bench, monkeypatch):
    monkeypatch.setattr(link, "_mismatches", lambda declared, expected: [])
    told = found(bench("fedavg"), called=("roll call: 1e12 rows", "roll call: another version"))
    assert all(told[name].startswith(("members", "ended the run")) for name in told if name.startswith("roll call"))


def test_what_flowers_own_fedavg_makes_of_it(recorded):
    stock = Stock(recorded)
    assert stock.becomes("NaN") == "not finite: 1 of 8 tensors"
    assert stock.becomes("num-examples 1e12") == "takes over the model"
    assert stock.becomes("dies") == "left out"
    assert stock.becomes("another round") == stock.becomes("another base") == "counts as sound"
    assert stock.becomes("extra metric") == "ends the run: InconsistentMessageReplies"
    assert stock.becomes("a (1, d) array").startswith("counts: ")
    assert stock.becomes("roll call: another version") == "-"


@pytest.mark.parametrize("bad", [False, True])
def test_the_door_tells_every_cell_and_fails_with_one(monkeypatch, capsys, recorded, bad):
    cells = [
        Cell(row="fedavg", group="strategies", fault="NaN", found="ok"),
        Cell(row="krum", group="robust", fault="NaN", found="another adapter in round 1" if bad else "ok"),
        Cell(row="krum", group=SMALL_ROLES, fault="an owner: 50.0 everywhere", found="ok"),
    ]
    monkeypatch.setattr(fault_matrix, "record", lambda place: recorded)
    monkeypatch.setattr(fault_matrix, "all_cells", lambda recorded, place, processes: cells)
    monkeypatch.setattr(logging, "disable", lambda level: None)
    monkeypatch.setattr(sys, "argv", ["fault_matrix.py"])
    assert fault_matrix.main() == bad
    shown = capsys.readouterr().out
    assert ("krum / NaN: another adapter in round 1" in shown) == bad
    assert SMALL_ROLES in shown
    assert "an owner: 50.0 everywhere" in shown
    monkeypatch.setattr(sys, "argv", ["fault_matrix.py", "--json"])
    assert fault_matrix.main() == bad
    told = json.loads(capsys.readouterr().out)
    assert told["failed"] == bad
    assert [cell["ok"] for cell in told["cells"]] == [True, not bad, True]
    assert told["stock"] == {"NaN": "not finite: 1 of 8 tensors"}


@pytest.mark.slow
def test_a_client_that_really_dies_or_hangs_costs_nobody_else_anything(recorded, tmp_path):
    assert [(cell.fault, cell.found) for cell in real_cells(recorded, tmp_path)] == [
        ("dies for real", "ok"),
        ("hangs for real", "ok"),
    ]
