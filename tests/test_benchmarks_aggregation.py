"""The aggregation benchmark on matrices of a few dozen rows: it measures what it says, and its faults are found."""

import json
import sys

import aggregation
import aggregation_costs
import pytest
from aggregation import Peak, Report, faults, growth, pass_terms, shown
from aggregation_costs import PRESETS, Cost, measure_matrix, over_layer


@pytest.fixture(autouse=True)
def _malloc_as_it_is(monkeypatch):
    """The setting would stay with the whole test process."""
    for module in (aggregation, aggregation_costs):
        monkeypatch.setattr(module, "map_blocks_above", lambda size: None)


@pytest.mark.parametrize("num_clients", [3, 8])
def test_every_preset_is_within_its_bound_on_a_small_matrix(num_clients):
    """48 x 40 at rank 4: three clients go through the QR-core, eight through the dense SVD."""
    costs = measure_matrix(48, 40, 4, num_clients)
    assert {cost.name for cost in costs} == {*PRESETS, "QR-core", "dense SVD", "torch.svd_lowrank"}
    assert faults(Report(layer={num_clients: costs})) == []
    assert all(cost.seconds > 0 and cost.mib >= 0 for cost in costs)


def test_a_layer_is_its_matrices_times_their_number():
    """2 * 1 s + 3 * 10 s; the larger memory and error."""
    small, large = Cost("x", 1.0, 5.0, 1e-9, 1e-8), Cost("x", 10.0, 7.0, 1e-12, 1e-8)
    assert over_layer([(2, [small]), (3, [large])]) == [Cost("x", 32.0, 7.0, 1e-9, 1e-8)]


def bad_report():
    costs = [
        Cost("fedit", 1.0, 1.0, 1e-3, 1e-12),
        Cost("nan", 1.0, 1.0, float("nan"), 1e-12),
        Cost("QR-core", 1.0, 1.0, 0.0, 1e-10),
        Cost("dense SVD", 49.0, 1.0, 0.0, 1e-10),
        Cost("torch.svd_lowrank", 1.0, 1.0, 0.5, None),
    ]
    terms = pass_terms(modules=64, width=1024, rank=4)
    return Report(
        layer={4: costs}, peaks=[Peak(4, 10.0, 0.0, 1.0), Peak(64, 10.0 + 60 * 0.03125 * 19, 0.0, 1.0)], terms=terms
    )


def test_what_is_above_its_bound_is_named():
    """An error, one that is no number, 49 x where 50 are wanted, and 19 modules a client."""
    found = faults(bad_report())
    assert [line.split(":")[0] for line in found] == [
        "K = 4, fedit",
        "K = 4, nan",
        "K = 4",
        "the two passes grow by 19.0 modules a client, above 18.0",
    ]
    assert growth(bad_report()) == pytest.approx(19.0)


def test_terms_by_hand():
    """Two factors of 1024 x 4 float32: 32 KiB; 64 modules 2 MiB, in float64 twice that."""
    assert pass_terms(64, 1024, 4) == {"adapter": 2.0, "result": 4.0, "one module of one client": 0.03125}


def test_the_report_shows_every_figure():
    text = shown(bad_report())
    assert "dense SVD / QR-core: 49.0 x" in text
    assert "grows by 19.0 x one module a client" in text


@pytest.mark.parametrize(("report", "code"), [(bad_report(), 1), (Report(peaks=bad_report().peaks[:1] * 2), 0)])
def test_the_exit_code_says_whether_all_bounds_hold(monkeypatch, capsys, report, code):
    monkeypatch.setattr(aggregation, "measured", lambda threads: report)
    monkeypatch.setattr(aggregation, "growth", lambda report: 19.0 * code)
    monkeypatch.setattr(sys, "argv", ["aggregation.py", "--json"])
    assert aggregation.main() == code
    printed = json.loads(capsys.readouterr().out)
    assert (printed["growth"], len(printed["faults"])) == (19.0 * code, 4 * code)


def test_two_passes_run_over_mapped_files(tmp_path, capsys):
    aggregation.two_passes(modules=3, width=16, rank=2, num_clients=4, folder=str(tmp_path))
    before, after = capsys.readouterr().out.splitlines()
    assert all(float(number) > 0 for number in (before + " " + after).split())


def test_every_optimiser_takes_a_step():
    steps = aggregation.measure_steps(((8, 6, 2),), 2)
    assert [cost.name for cost in steps] == ["FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"]
