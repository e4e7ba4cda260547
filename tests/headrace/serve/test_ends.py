"""How a start ends that is asked to: by a terminal, a closed one, make's end, a signal before anything was imported."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.console import Lenient
from tests.stack import START_S, Stack, free_port

ROOT = Path(__file__).parents[3]
DEMO = ROOT / "examples" / "demo-model"


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def options(where: Path) -> list[str]:
    return [
        "--model", str(DEMO), "--engine", "simulated", "--port", str(free_port()), "--run-dir", str(where / "run"),
        "--data-dir", str(where / "data"), "--drain-timeout", "1",
    ]  # fmt: skip


def started(where: Path) -> list[int]:
    """The processes of a start that has all four."""
    import json

    listed = where / "run" / "processes.json"
    until(lambda: listed.exists() and len(json.loads(listed.read_text())) == 4, "four processes")
    return [entry["pid"] for entry in json.loads(listed.read_text())]


@pytest.mark.parametrize("command", ["serve", "worker", "scheduler", "gateway"])
def test_sigterm_before_the_imports_are_done_is_a_clean_end(command: str) -> None:
    code = (
        "import os, signal, sys\n"
        f"sys.argv = ['headrace', {command!r}]\n"
        "from headrace import early\n"
        "early.end_cleanly()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=START_S).returncode == 0


def test_a_closed_terminal_drains_unless_it_is_to_be_ignored(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headrace", "serve", *options(tmp_path)]
    process = subprocess.Popen(["nohup", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pids = started(tmp_path)
    process.send_signal(signal.SIGHUP)  # nohup: ignored
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(START_S) == 0
    assert not any(map(alive, pids))

    stack = Stack(tmp_path / "plain", "--model", str(DEMO), "--engine", "simulated")
    stack.start()
    assert stack.process is not None
    pids = started(tmp_path / "plain")
    stack.process.send_signal(signal.SIGHUP)
    assert stack.process.wait(START_S) == 0
    assert not any(map(alive, pids))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("way", ["ctrl-c", "make is killed"])
def test_under_make_and_through_a_pipe_nothing_is_left(tmp_path: Path, way: str) -> None:
    """As `make serve 2>&1 | tee log` on a terminal, which is given a Ctrl-C; or whose make is killed alone."""
    makefile = tmp_path / "Makefile"
    recipe = next(
        line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("\t@bash") and "serve" in line
    )
    recipe = recipe.replace("$(BIN)/headrace", f"{sys.executable} -m headrace")
    makefile.write_text(f"serve:\n{recipe}\n")
    line = f"make -f {makefile} serve ARGS='{' '.join(options(tmp_path))}' 2>&1 | tee {tmp_path / 'log'}"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("bash", ["bash", "-ic", line], {**os.environ, "PYTHONPATH": str(ROOT)})
    pids = started(tmp_path)
    if way == "ctrl-c":
        os.write(terminal, b"\x03")
    else:
        (make,) = [
            int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal() and is_make(entry, makefile)
        ]
        os.kill(make, signal.SIGKILL)
    try:
        until(lambda: not any(map(alive, pids)), f"nothing is left after {way}: {(tmp_path / 'log').read_text()}")
    finally:
        os.close(terminal)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def is_make(entry: Path, makefile: Path) -> bool:
    """Whether this process is the make that was given this file: the one that runs these tests was given another."""
    try:
        words = (entry / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return words[0].rpartition("/")[2] == "make" and str(makefile) in words


def test_a_reader_that_goes_away_only_ends_the_output() -> None:
    read, write = os.pipe()
    with open(write, "w") as stream:
        output = Lenient(stream)
        output.write("seen")
        assert os.read(read, 10) == b"seen"
        os.close(read)
        assert output.write("lost") == 4
        assert output.write("lost too") == 8
