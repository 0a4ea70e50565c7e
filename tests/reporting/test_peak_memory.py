"""Peak memory: a run's own, whatever ran before it in the same process; and what is told where it cannot be set back."""

import json
import resource
from pathlib import Path

import pytest
import torch
from helpers_runs import finetune

from fedunlearn.doors import stages
from fedunlearn.reporting import peak_memory as module
from fedunlearn.reporting.peak_memory import peak_memory, reset_peak

LARGE, SMALL = 300, 50  # MiB


def can_be_set_back() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return "VmHWM" in Path("/proc/self/status").read_text()


needs_clear_refs = pytest.mark.skipif(not can_be_set_back(), reason="this system cannot set its mark back")


def hold(mib: int) -> None:
    """Touches that much memory and lets it go."""
    torch.ones(mib * 2**18).sum()  # float32: 2^18 a MiB


@needs_clear_refs
def test_the_second_and_smaller_of_two_has_the_smaller_peak():
    found = []
    for size in (LARGE, SMALL):
        reset_peak()
        hold(size)
        found.append(peak_memory().resident)
    assert found[0] - found[1] > 0.8 * (LARGE - SMALL)
    hold(LARGE)
    assert peak_memory().resident > found[1] + 0.8 * (LARGE - SMALL)  # it grows until it is set back


@needs_clear_refs
def test_so_it_is_for_two_runs_in_one_process(pocket, saves, monkeypatch):
    real = stages.launch

    def hungry(launcher, plain):
        hold(LARGE if plain["task_name"] == "first" else 0)
        real(launcher, plain)

    finetune(pocket, saves, "before")  # what is loaded once is in both
    monkeypatch.setattr(stages, "launch", hungry)
    first, second = (
        json.loads((finetune(pocket, saves, name) / "done.json").read_text())["account"] for name in ("first", "second")
    )
    assert first["peak_memory_mib"] - second["peak_memory_mib"] > 0.8 * LARGE
    assert second["peak_memory_mib"] > 50
    if not torch.cuda.is_initialized():
        assert second["peak_device_memory_mib"] is None


def test_where_the_mark_cannot_be_set_back_it_is_the_process_s(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "CLEAR", tmp_path / "no" / "clear_refs")
    monkeypatch.setattr(module, "STATUS", tmp_path / "no" / "status")
    hold(SMALL)
    reset_peak()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_memory().resident == pytest.approx(most / 2**10 if module.sys.platform != "darwin" else most / 2**20)


def test_a_status_without_the_mark_is_no_end(monkeypatch, tmp_path):
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t5 kB\n")
    monkeypatch.setattr(module, "STATUS", tmp_path / "status")
    assert peak_memory().resident > 1
    (tmp_path / "status").write_text("VmHWM:\t  2048 kB\n")
    assert peak_memory().resident == 2.0


@pytest.mark.gpu
def test_on_a_device_its_own_peak_is_told_beside():
    found = []
    for size in (LARGE, SMALL):
        kept = torch.zeros(1, device="cuda")
        reset_peak()
        torch.ones(size * 2**18, device="cuda").sum()
        found.append(peak_memory().device)
        del kept
    assert found[0] == pytest.approx(LARGE, abs=5)
    assert found[1] == pytest.approx(SMALL, abs=5)
