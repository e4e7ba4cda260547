"""A service manager is told what is so; its unit is one that systemd accepts."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.serve.notify import notify
from tests.stack import START_S, Stack

ROOT = Path(__file__).parents[3]
UNIT = ROOT / "deploy" / "systemd" / "headrace.service"
HELP = [sys.executable, "-m", "headrace", "serve", "--help"]
DEMO = ROOT / "examples" / "demo-model"


def test_ready_and_stopping_are_told_and_the_watchdog_is_fed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(START_S)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        stack = Stack(tmp_path / "stack", "--model", str(DEMO), "--engine", "simulated", env=env)
        stack.start()
        told = [manager.recv(100)]
        while told[-1] != b"READY=1":
            told.append(manager.recv(100))
        assert set(told) == {b"WATCHDOG=1", b"READY=1"}
        stack.wait_ready()  # what was told is so
        assert stack.process is not None
        stack.process.send_signal(signal.SIGTERM)
        while told[-1] != b"STOPPING=1":
            told.append(manager.recv(100))
        assert stack.process.wait(START_S) == 0


def test_without_a_manager_or_with_one_that_is_gone_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "none"))
    notify("READY=1")


def test_the_unit_starts_what_there_is(tmp_path: Path) -> None:
    """The command line of the unit is understood, and systemd-analyze finds nothing to say where it is installed."""
    unit = UNIT.read_text()
    (command,) = re.findall(r"^ExecStart=(\S+) (.*)$", unit, re.M)
    words = shlex.split(command[1].replace("${STATE_DIRECTORY}", "/s").replace("${RUNTIME_DIRECTORY}", "/r"))
    assert words[0] == "serve"
    told = subprocess.run(HELP, capture_output=True, text=True, check=True).stdout
    for option in words[1:]:
        assert not option.startswith("--") or option in told, option
    assert "RestartPreventExitStatus=78" in unit
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "headrace"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / "headrace.service"
    copy.write_text(unit.replace(command[0], str(program)))
    found = subprocess.run([analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
