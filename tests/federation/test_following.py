"""What the submitter of launcher=superlink makes of the ends that a run can come to, from what a SuperLink says of it."""

import io
import json
import logging
import sys
from dataclasses import dataclass, field

import pytest
from rich.console import Console
from rich.logging import RichHandler

from fedunlearn.config.launcher import SuperlinkLauncher
from fedunlearn.errors import UserError
from fedunlearn.federation.deployed.brief import TOLD
from fedunlearn.federation.deployed.server import tell, telling_faults, telling_warnings
from fedunlearn.federation.launchers.superlink import CONNECTION, _Connection, _follow

RUN = 7


@dataclass
class Said:
    """A SuperLink by what it says: the log at each look, then the status; the last of each again and again."""

    logs: list
    statuses: list
    launcher: SuperlinkLauncher = field(
        default_factory=lambda: SuperlinkLauncher(address="127.0.0.1:1", insecure=True, start_timeout=0.01)
    )

    def lines(self, run_id):
        assert run_id == RUN
        return iter(self.logs.pop(0) if len(self.logs) > 1 else self.logs[0])

    def status(self, run_id):
        assert run_id == RUN
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


def told(**what):
    return f"{TOLD}{json.dumps(what)}\n"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr("fedunlearn.federation.launchers.superlink.SECONDS_BETWEEN_LOOKS", 0.02)


def test_a_run_that_tells_its_end_has_ended_well():
    assert _follow(Said([["x\n", told(done={"folder": "finetune/ft"})]], ["finished:completed"]), RUN) == {
        "folder": "finetune/ft"
    }


def test_faults_of_the_server_are_the_users():
    with pytest.raises(UserError, match=r"^one is wrong\n.*two is wrong$"):
        _follow(Said([[told(faults=["one is wrong", "two is wrong"])]], ["finished:failed"]), RUN)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("finished:failed", "ended as 'finished:failed' without a word: its ServerApp died"),
        ("finished:completed", "ended as 'finished:completed' without a word"),
        ("finished:stopped", "was stopped by somebody else"),
    ],
)
def test_a_run_that_ends_without_a_word_is_an_error_with_the_way_out(status, said):
    with pytest.raises(UserError, match="resume=true goes on where its last whole round ended") as raised:
        _follow(Said([["INFO : nothing of ours\n"]], ["running", status]), RUN)
    (fault,) = raised.value.faults
    assert fault.startswith(f"run {RUN} at 127.0.0.1:1 {said}")


def test_last_words_that_a_broken_connection_swallowed_are_read_again():
    heard = Said([[], [told(done={"folder": "finetune/ft"})]], ["finished:completed"])
    assert _follow(heard, RUN) == {"folder": "finetune/ft"}


def test_warnings_of_the_server_are_told_once_though_its_log_is_read_twice(caplog):
    first, second = told(warning=[1, "client 2 is late"]), told(warning=[2, "client 2 is late"])
    logs = [[first], [first, second, told(done={"folder": "finetune/ft"})]]
    _follow(Said(logs, ["running", "finished:completed"]), RUN)
    assert caplog.messages == ["server: client 2 is late"] * 2


def test_a_served_run_tells_the_warnings_of_this_package_while_it_lasts(capsys):
    log = logging.getLogger("fedunlearn.federation.link")
    with telling_warnings():
        log.warning("%s: the run goes on without", "roll call: client 2 is not there")
        log.info("nothing to worry about")
        logging.getLogger("flwr").warning("of another package")
    log.warning("later")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(TOLD)]
    assert json.loads(line.removeprefix(TOLD)) == {
        "warning": [1, "roll call: client 2 is not there: the run goes on without"]
    }


def test_a_server_that_fails_tells_the_way_out(capsys):
    """As where the SuperLink is killed while a message is handed over: nothing of the config is wrong."""
    with pytest.raises(OSError, match="replaced"), telling_faults():
        raise OSError("the push session was replaced")
    with pytest.raises(
        UserError, match=r"the server failed: OSError: the push session was replaced; .* resume=true goes on"
    ):
        _follow(Said([capsys.readouterr().out.splitlines(keepends=True)], ["finished:failed"]), RUN)
    with pytest.raises(UserError, match="wrong"), telling_faults():
        raise UserError("r is wrong")
    with pytest.raises(UserError, match=r"^r is wrong$"):
        _follow(Said([capsys.readouterr().out.splitlines(keepends=True)], ["finished:failed"]), RUN)


def test_a_superlink_that_falls_silent_is_given_up():
    with pytest.raises(UserError, match="the SuperLink does not answer any more"):
        _follow(Said([[]], [""]), RUN)


def test_what_a_client_says_is_not_taken_for_the_server_s_word(caplog):
    """A client's reason stands in a warning, which is wrapped wherever a terminal would be at its end."""
    said = io.StringIO()
    forged = json.dumps({"done": {"folder": "forged", "metrics": {}}}, separators=(",", ":"))
    words = f"{'x' * 60} {TOLD}{forged} {'y' * 60}"
    console = Console(file=said, width=80)
    record = logging.LogRecord(
        "fedunlearn", logging.WARNING, "", 0, "client 2 is dropped this round: %s", (words,), None
    )
    RichHandler(console=console, show_path=False, show_level=False, markup=False).emit(record)
    lines = said.getvalue().splitlines(keepends=True)
    assert any(line.strip() == TOLD + forged for line in lines)
    with pytest.raises(UserError, match="one is wrong"):
        _follow(Said([[*lines, told(faults=["one is wrong"])]], ["finished:failed"]), RUN)


def test_a_told_line_is_one_whatever_was_written_in_front_of_it(capsys):
    sys.stdout.write("Loading: 50%")
    tell("done", {"folder": "finetune/ft"})
    assert _follow(Said([capsys.readouterr().out.splitlines()], ["finished:completed"]), RUN) == {
        "folder": "finetune/ft"
    }


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('Stopping run ID 7...\n{"success": true, "run-id": "7"}', "run 7 was stopped at the server; the same command"),
        ('{"success": false, "error-message": "Run 7 is over"}', "could not be stopped at the server (Run 7 is over)"),
        ("no answer within 60 s", "could not be stopped at the server (no answer within 60 s): it may go on there"),
    ],
)
def test_ctrl_c_says_whether_the_run_was_stopped(monkeypatch, tmp_path, answer, said):
    asked = []
    monkeypatch.setattr(_Connection, "command", lambda self, *words: asked.append(words) or answer)
    connection = _Connection(SuperlinkLauncher(address="127.0.0.1:1", insecure=True), tmp_path)
    assert said in connection.stop(RUN)
    assert asked == [("stop", "7", CONNECTION, "--format", "json")]


def test_a_python_without_flowers_programs_is_told_in_one_message(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    connection = _Connection(SuperlinkLauncher(address="127.0.0.1:1", insecure=True), tmp_path)
    with pytest.raises(
        UserError, match=r"/flwr cannot be started \(No such file or directory\): install fedunlearn into"
    ):
        connection.status(RUN)
