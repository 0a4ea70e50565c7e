"""Processes that end whole: with SIGTERM, with SIGKILL where they do not listen, and with their parent."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
from federation_here import trial

from fedunlearn.errors import UserError
from fedunlearn.sites import running
from fedunlearn.sites.commands import Command
from fedunlearn.sites.running import Child, alone_in, asked_to_stop, interrupted, until
from fedunlearn.sites.server import run_server

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)
PARENT_OF_STUBBORN = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); print(p.pid, flush=True); time.sleep(60)"


def python(code, folder="."):
    return Command(name="it", argv=(sys.executable, "-c", code), folder=str(folder), environment={"SAID": "hello"})


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def wait_for(happened):
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_lines_are_passed_on_with_the_environment_and_folder(tmp_path, capsys):
    child = Child(python("import os; print(os.environ['SAID'], os.getcwd())", tmp_path), retell=str.upper)
    wait_for(lambda: child.ended() is not None)
    assert child.why() == "it: it ended with code 0; see the lines above"
    assert list(child.lines) == [f"hello {tmp_path}"]
    assert capsys.readouterr().err == f"HELLO {tmp_path}\n".upper()


class Deaf(io.StringIO):
    """A stderr whose reader has gone away."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_process_goes_on_when_nobody_hears_us_any_more(monkeypatch):
    """A pipe holds 64 KiB; who waits at a full one never ends."""
    monkeypatch.setattr(sys, "stderr", Deaf())
    child = Child(python("for _ in range(2000): print('x' * 100)"))
    try:
        wait_for(lambda: child.ended() is not None)
        assert child.ended() == 0
    finally:
        child.end()


def test_what_does_not_listen_is_killed_with_its_children(monkeypatch):
    monkeypatch.setattr(running, "GRACE", 0.5)
    child = Child(python(PARENT_OF_STUBBORN))
    wait_for(lambda: "ready" in child.lines)
    grandchild = int(child.lines[0])
    child.end()
    assert child.ended() == -signal.SIGTERM
    wait_for(lambda: not alive(grandchild))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent died")
def test_a_child_ends_with_a_parent_that_was_killed():
    code = (
        "import sys, time; from fedunlearn.sites.running import Child; from fedunlearn.sites.commands import Command; "
        "c = Child(Command(name='it', argv=(sys.executable, '-c', 'import time; time.sleep(60)'), folder='.')); print(c.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert alive(child)
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(child))


@pytest.mark.parametrize(("number", "is_interrupt"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_is_a_wish_and_the_handlers_come_back(number, is_interrupt):
    before = signal.getsignal(number)
    with asked_to_stop() as stop:
        assert not stop.wait(0.01)
        os.kill(os.getpid(), number)
        assert stop.wait(5)
        assert not until(lambda: False, stop, 60)
    assert signal.getsignal(number) == before
    if is_interrupt:
        with pytest.raises(KeyboardInterrupt, match="has ended"):
            interrupted(stop)
    else:
        interrupted(stop)


def test_one_site_a_work_dir(tmp_path):
    with (
        alone_in(str(tmp_path)),
        pytest.raises(UserError, match="another site is running in it"),
        alone_in(str(tmp_path)),
    ):
        pass
    with alone_in(str(tmp_path)):  # it is free again
        pass


def test_until_gives_up_in_time():
    with asked_to_stop() as stop:
        assert not until(lambda: False, stop, 0.05)
        assert until(lambda: True, stop, 0)


def test_a_program_that_is_not_there():
    with pytest.raises(UserError, match="/none cannot be started"):
        Child(Command(name="it", argv=("/none",), folder="."))


def test_an_interrupt_before_anything_was_started_says_so():
    with pytest.raises(KeyboardInterrupt, match="nothing had been started"), running.nothing_started():
        raise KeyboardInterrupt


def test_a_server_whose_folder_another_has_changes_nothing_there(tmp_path):
    site = trial(tmp_path) / "server" / "server.yaml"
    (site.parent / "work").mkdir(mode=0o700)
    with alone_in(str(site.parent / "work")), pytest.raises(UserError, match="another site is running in it"):
        run_server(site)
    assert [path.name for path in (site.parent / "work").iterdir()] == ["site.lock"]
