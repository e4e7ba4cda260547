"""Ranks that come in by a rendezvous: they serve like local ones, end by themselves when the link goes, come again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from protocol.errors import EX_CONFIG, EngineFailed, StartError
from protocol.messages import Plan
from tests.workers.engines.test_process import FAST, new, rows
from tests.workers.engines.test_ranks import fails, gone
from workers.engines import ranks
from workers.engines.ranks import Remote
from workers.engines.remote import address_of, free_port


@pytest.fixture
def address():
    return "127.0.0.1", free_port("127.0.0.1")


@pytest.fixture
def program(address):
    """Starts `headrace worker --rank K`; ends what it started."""
    started = []

    def start(rank):
        command = [sys.executable, "-m", "headrace", "worker", "--rank", str(rank)]
        started.append(subprocess.Popen([*command, "--rendezvous", f"{address[0]}:{address[1]}"]))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.wait(20)


@pytest.fixture
def loaded(ranked, address):
    return lambda: ranked("simulated", FAST, 2, 1, Remote(address))


def child_of(pid):
    """The engine process of a rank's program."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.02)
    raise AssertionError("it has none")


def run(engine):
    engine.reset()
    engine.execute(Plan(0, 0, 1, rows(0), b"\5\0\0\0", new=[new(0)])).wait()
    tokens = [int(engine.execute(Plan(0, 0, step, rows(0))).wait().tokens[0]) for step in range(2, 5)]
    deadline = time.monotonic() + 10
    while len({shown.steps for shown in engine.shown()}) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len({shown.steps for shown in engine.shown()}) == 1
    return tokens


def test_a_rank_comes_in_serves_ends_with_the_link_and_comes_again(loaded, program):
    process = program(1)
    engine = loaded()
    first = run(engine)
    child = child_of(process.pid)
    engine.close()
    assert gone(child)
    assert process.poll() is None
    assert run(loaded()) == first
    assert child_of(process.pid) != child


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_remote_rank_that_dies_or_freezes_ends_all(loaded, program, monkeypatch, number):
    monkeypatch.setattr(ranks, "SILENCE_S", 2.0)
    process = program(1)
    engine = loaded()
    child = child_of(process.pid)
    os.kill(child, number)
    assert "rank 1" in fails(engine)
    assert gone(engine.ranks[0].pid)
    os.kill(child, signal.SIGCONT) if number == signal.SIGSTOP else None
    assert gone(child)


def test_a_rank_that_is_not_awaited_is_told_so(loaded, program):
    threading.Thread(target=loaded, daemon=True).start()
    assert program(5).wait(60) == EX_CONFIG
    program(1)


def test_an_address_that_is_none_is_refused():
    assert address_of("10.0.0.1:7000") == ("10.0.0.1", 7000)
    assert address_of("[::1]:7000") == ("::1", 7000)
    for wrong in ("7000", "host:", "host:70000", ":7000"):
        with pytest.raises(StartError, match="HOST:PORT"):
            address_of(wrong)


def test_the_worker_s_death_is_seen_without_its_goodbye(loaded, program):
    """A link that is only silent: as when a machine loses its power."""
    process = program(1)
    engine = loaded()
    child = child_of(process.pid)
    engine.ranks[1]._gone.set()  # no pings any more, the connection stays
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and not gone(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(child)
    with pytest.raises(EngineFailed, match="rank 1"):
        engine.beat()
