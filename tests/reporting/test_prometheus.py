"""A history as a Prometheus textfile, by hand and from a real run; and the script that writes it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_runs import central, finetune, history

from fedunlearn.doors.history import history_table, tell_history
from fedunlearn.errors import UserError
from fedunlearn.reporting.prometheus import textfile, write_textfile

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = re.compile(r'^(fedunlearn_[a-z_]+)(\{(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*\}) (-?[0-9.e+-]+)$')


def client(number, **changed):
    usual = {
        "client_id": number,
        "role": "finetune",
        "reason": "",
        "weight": 0.5,
        "update_norm": 1.5,
        "bytes_down": 100,
        "bytes_down_reference": 10,
        "bytes_up": 20,
    }
    return {**usual, **changed}


def line(number, *clients, **changed):
    usual = {
        "round": number,
        "parts": {"collecting": 2.0, "averaging": 0.25, "evaluating": 0.0, "writing": 0.5},
        "clients": list(clients),
        "aggregation_error": 0.125,
        "metrics": {"loss/finetune": 3.0},
        "evaluation": {},
        "by_clients": None,
    }
    return {**usual, **changed}


LINES = [
    line(1, client(0), client(1), evaluation={"forget_prob": 0.75, "rouge": None}),
    line(
        2,
        client(0, weight=1.0),
        client(1, reason="nan", weight=0.0, update_norm=None),
        client(2, role="idle", weight=0.0, update_norm=None),
        client(3, weight=0.0),
        by_clients={"figures": {"forget_loss": 4.0}},
    ),
]


def values(text):
    found = {}
    for row in text.splitlines():
        if not row.startswith("# "):
            name, labels, value = SAMPLE.match(row).groups()
            found[name + labels] = float(value)
    return found


def test_totals_are_over_all_rounds_and_gauges_of_the_last():
    found = values(textfile(LINES, "un", False))
    assert found['fedunlearn_rounds_total{run="un"}'] == 2
    assert found['fedunlearn_finished{run="un"}'] == 0
    assert found['fedunlearn_seconds_total{run="un",part="collecting"}'] == 4.0
    assert found['fedunlearn_round_seconds{run="un",part="collecting"}'] == 2.0
    assert found['fedunlearn_bytes_total{run="un",direction="down"}'] == 600
    assert found['fedunlearn_bytes_total{run="un",direction="down_reference"}'] == 60
    assert found['fedunlearn_bytes_total{run="un",direction="up"}'] == 120
    assert found['fedunlearn_dropped_total{run="un",reason="nan"}'] == 1
    for outcome in ("counted", "dropped", "idle", "unweighted"):
        assert found[f'fedunlearn_clients{{run="un",outcome="{outcome}"}}'] == 1
    assert found['fedunlearn_client_weight{run="un",client="0"}'] == 1.0
    assert 'fedunlearn_client_update_norm{run="un",client="1"}' not in found
    assert found['fedunlearn_aggregation_error{run="un"}'] == 0.125
    assert found['fedunlearn_metric{run="un",name="loss/finetune"}'] == 3.0


def test_the_newest_of_each_figure_stays():
    found = values(textfile(LINES, "un", True))
    assert found['fedunlearn_evaluation{run="un",by="server",name="forget_prob"}'] == 0.75
    assert found['fedunlearn_evaluation{run="un",by="clients",name="forget_loss"}'] == 4.0
    assert not any("rouge" in name for name in found)


def test_a_run_without_rounds_is_told_too():
    assert values(textfile([], "un", False)) == {
        'fedunlearn_rounds_total{run="un"}': 0,
        'fedunlearn_finished{run="un"}': 0,
        **{f'fedunlearn_bytes_total{{run="un",direction="{way}"}}': 0 for way in ("down", "down_reference", "up")},
    }


def test_labels_are_escaped():
    text = textfile(LINES[:1], 'a"b\\c\nd', True)
    assert 'run="a\\"b\\\\c\\nd"' in text
    assert len(values(text)) == len([row for row in text.splitlines() if not row.startswith("#")])


def test_each_metric_is_described_once_in_front_of_its_samples():
    names, described = [], []
    for row in textfile(LINES, "un", True).splitlines():
        if row.startswith("# TYPE "):
            described.append(row.split()[2])
            assert row.split()[3] == ("counter" if row.split()[2].endswith("_total") else "gauge")
        elif not row.startswith("#"):
            names.append(row.split("{")[0])
            assert names[-1] == described[-1]
    assert sorted(set(described)) == sorted(described) == sorted(set(names))


def test_it_is_written_in_one_rename(tmp_path):
    path = tmp_path / "un.prom"
    path.write_text("old")
    write_textfile(path, LINES, "un", True)
    assert path.read_text() == textfile(LINES, "un", True)
    assert [place.name for place in tmp_path.iterdir()] == ["un.prom"]
    with pytest.raises(UserError, match="cannot be written"):
        write_textfile(path / "below", LINES, "un", True)


def test_a_real_run_s_history(pocket, saves, tmp_path, capsys):
    run = finetune(pocket, saves)
    tell_history(run, tmp_path / "ft.prom")
    found = values((tmp_path / "ft.prom").read_text())
    sent = sum(client["bytes_up"] for line in history(run) for client in line["clients"])
    assert found['fedunlearn_bytes_total{run="ft",direction="up"}'] == sent > 0
    assert (found['fedunlearn_rounds_total{run="ft"}'], found['fedunlearn_finished{run="ft"}']) == (2, 1)
    assert history_table(history(run), "ft").row_count == 2
    tell_history(run, None)
    assert "4 of 4" in capsys.readouterr().out
    alone = central(pocket, saves, "finetune", "alone")
    tell_history(alone, tmp_path / "alone.prom")
    assert values((tmp_path / "alone.prom").read_text())['fedunlearn_seconds_total{run="alone",part="collecting"}'] > 0


def test_the_script_refuses_what_is_no_run(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "history.py"), str(tmp_path), "--prometheus", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {str(tmp_path)!r} is no run's folder: name one, as in saves/<finetune|unlearn|eval>/<task_name>\n"  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_a_history_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "history.jsonl").write_text(json.dumps({"round": 1, "clients": []}) + "\n")
    with pytest.raises(UserError, match="is of an earlier version, without its rounds' parts"):
        tell_history(tmp_path, None)
