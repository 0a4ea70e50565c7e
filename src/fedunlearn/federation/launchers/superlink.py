"""launcher=superlink: hands a run to a SuperLink, follows it and tells its history; the work is done by other processes, mostly on other machines.

What is submitted is a pyproject.toml that names two modules of the installed package; the composed config travels as one JSON string.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fedunlearn
from fedunlearn.config.launcher import SuperlinkLauncher
from fedunlearn.errors import UserError
from fedunlearn.federation.deployed.brief import CONFIG_KEY, GO_ON, TOLD
from fedunlearn.sites.commands import CONNECTION, answer_in, flower_config, flower_environment, program

log = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS, SECONDS_FOR_A_COMMAND = 2.0, 60.0
PLAIN = {"NO_COLOR": "1", "COLUMNS": "200"}
ENDED, STOPPED = "finished:", "finished:stopped"
BUNDLE = f"""[project]
name = "fedunlearn-run"
version = "{fedunlearn.__version__}"
description = "A run of fedunlearn, which every node has installed"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedunlearn"

[tool.flwr.app.components]
serverapp = "fedunlearn.doors.deployed:app"
clientapp = "fedunlearn.federation.deployed.thin_client:app"

[tool.flwr.app.config]
{CONFIG_KEY} = ""
"""


def submit(launcher: SuperlinkLauncher, plain: Mapping[str, Any]) -> Mapping[str, Any]:
    """Runs a composed config on a SuperLink to its end; gives what the server tells of the result: the run's folder and its metrics.

    Raises UserError where the SuperLink cannot be reached, or with the server's own faults. Ctrl-C stops the run at the server.
    """
    with _connection(launcher) as connection:
        run_id = connection.start(plain)
        log.info("run %d at %s", run_id, launcher.address)
        try:
            return _follow(connection, run_id)
        except KeyboardInterrupt as stop:
            raise KeyboardInterrupt(connection.stop(run_id)) from stop


@dataclass(frozen=True)
class _Connection:
    """A SuperLink by way of Flower's command line. home: FLWR_HOME of this run alone."""

    launcher: SuperlinkLauncher
    home: Path

    def start(self, plain: Mapping[str, Any]) -> int:
        """Submits the bundle; gives the run's id."""
        bundle = self.home / "bundle"
        bundle.mkdir()
        (bundle / "pyproject.toml").write_text(BUNDLE, encoding="utf-8")
        text = json.dumps(
            json.dumps(plain, sort_keys=True), ensure_ascii=False
        )  # a TOML string is written as JSON writes it
        (self.home / "run.toml").write_text(f"{CONFIG_KEY} = {text}\n", encoding="utf-8")
        answer = self.command(
            "run", str(bundle), CONNECTION, "--run-config", str(self.home / "run.toml"), "--format", "json"
        )
        found = answer_in(answer)
        if not found.get("success") or "run-id" not in found:
            raise UserError(
                f"launcher=superlink: the SuperLink at {self.launcher.address} did not take the run: {_words(answer)}"
            )
        return int(found["run-id"])

    def status(self, run_id: int) -> str:
        """The run's status as Flower says it; empty where the SuperLink does not answer."""
        found = answer_in(self.command("ls", CONNECTION, "--run-id", str(run_id), "--format", "json"))
        runs = found.get("runs") or [{}]
        return str(runs[0].get("status", ""))

    def stop(self, run_id: int) -> str:
        """Stops a run at the server; says what came of it."""
        answer = self.command("stop", str(run_id), CONNECTION, "--format", "json")
        if answer_in(answer).get("success") is True:
            return f"run {run_id} was stopped at the server; {GO_ON}"
        return f"run {run_id} could not be stopped at the server ({_words(answer)}): it may go on there"

    def command(self, *words: str) -> str:
        """Gives what a command of Flower's wrote. Raises UserError where there is no such program."""
        try:
            done = subprocess.run(
                [program("flwr"), *words],
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=SECONDS_FOR_A_COMMAND,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"no answer within {SECONDS_FOR_A_COMMAND:g} s"
        except OSError as error:
            raise UserError(
                f"launcher=superlink: {program('flwr')} cannot be started ({error.strerror or error}): install fedunlearn into this Python ({sys.executable})"
            ) from error
        return done.stdout if done.stdout.strip() else done.stderr

    def lines(self, run_id: int) -> Iterator[str]:
        """The run's log as it grows, until the run or the connection ends."""
        process = subprocess.Popen(
            [program("flwr"), "log", str(run_id), CONNECTION],
            env={**self._environment, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        try:
            yield from process.stdout
        finally:
            process.terminate()
            process.wait()

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, **flower_environment(self.home), **PLAIN}


@contextmanager
def _connection(launcher: SuperlinkLauncher) -> Iterator[_Connection]:
    with tempfile.TemporaryDirectory(prefix="fedunlearn-") as folder:
        home = Path(folder)
        ca = None if launcher.root_certificates is None else str(Path(launcher.root_certificates).resolve())
        (home / "config.toml").write_text(flower_config(launcher.superlink, ca), encoding="utf-8")
        yield _Connection(launcher, home)


class _Follower:
    """What the server has told so far; a log that is read again from its beginning tells nothing twice."""

    def __init__(self) -> None:
        self.rounds: set[int] = set()
        self.warned = 0
        self.faults: list[str] = []
        self.done: Mapping[str, Any] | None = None

    def hear_all(self, connection: _Connection, run_id: int) -> None:
        """Takes the run's log, until it or the connection ends."""
        for line in connection.lines(run_id):
            self.hear(line)

    def hear(self, line: str) -> None:
        """Takes one line of the log."""
        if not line.startswith(TOLD):  # elsewhere in a line it may be the words of a client, which the server logs
            log.debug("server: %s", line.rstrip())
            return
        for kind, value in answer_in(line.removeprefix(TOLD)).items():
            self._take(kind, value)

    def _take(self, kind: str, value: Any) -> None:
        if kind == "faults":
            self.faults = list(map(str, value))
        elif kind == "done":
            self.done = value
        elif kind == "warning" and value[0] > self.warned:
            self.warned = value[0]
            log.warning("server: %s", value[1])
        elif kind == "history" and value["round"] not in self.rounds:
            self.rounds.add(value["round"])
            log.info("%s", _told_round(value))


def _follow(connection: _Connection, run_id: int) -> Mapping[str, Any]:
    follower = _Follower()
    silent_since: float | None = None
    while True:
        follower.hear_all(connection, run_id)
        status = connection.status(run_id)
        if status.startswith(ENDED):
            break
        now = time.monotonic()
        silent_since = None if status else silent_since or now
        if silent_since is not None and now - silent_since > connection.launcher.start_timeout:
            raise UserError(
                f"launcher.address={connection.launcher.address!r}: the SuperLink does not answer any more (run {run_id}); start it again, then {GO_ON}"
            )
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if follower.done is None and not follower.faults:
        follower.hear_all(connection, run_id)  # a connection that broke may have kept its last words from us
    if follower.done is None:
        raise UserError(*(follower.faults or [_silent_end(connection, run_id, status)]))
    return follower.done


def _silent_end(connection: _Connection, run_id: int, status: str) -> str:
    """Why a run ended that did not say why, as far as Flower knows: its ServerApp tells every end that it lives to see."""
    run = f"run {run_id} at {connection.launcher.address}"
    if status == STOPPED:
        return f"{run} was stopped by somebody else; {GO_ON}"
    return (
        f"{run} ended as {status!r} without a word: its ServerApp died (killed from outside, or memory ran out; the server's own messages and the "
        f"SuperLink's log may say more); mend the cause, then {GO_ON}"
    )


def _told_round(line: Mapping[str, Any]) -> str:
    """One round in words: who counted, who did not and why, bytes and seconds."""
    clients = line["clients"]
    counted = [client["client_id"] for client in clients if client["weight"] > 0]
    dropped = [
        f"client {client['client_id']}: {client['reason']} ({client['detail']})"
        for client in clients
        if client["reason"]
    ]
    sent = sum(client["bytes_down"] + client["bytes_down_reference"] for client in clients)
    came = sum(client["bytes_up"] for client in clients)
    told = f"round {line['round']}: clients {counted}, {sent / 1e6:.2f} MB down, {came / 1e6:.2f} MB up, {line['seconds']:.1f} s"
    return "; ".join([told, *dropped])


def _words(text: str) -> str:
    """What a command said, as one line."""
    return " ".join(str(answer_in(text).get("error-message") or text).split())[:500] or "it said nothing"
