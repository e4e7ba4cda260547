"""Ranks share one fate: the death or silence of one is the end of all, with its reason, and leaves no process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from protocol.errors import EngineFailed, StartError
from protocol.messages import Plan
from tests.conftest import MODEL
from tests.workers.engines.test_process import FAST, new, rows
from tests.workers.scripted import ScriptedScheduler
from workers.engines import ranks
from workers.engines.ranks import RankedEngine
from workers.engines.simulated import SimulatedEngine
from workers.service import WorkerConfig, make_engine, run_worker
from workers.torch_engine.config import EngineConfig


@pytest.fixture
def loaded(ranked):
    return lambda kind="simulated", config=FAST, size=3: ranked(kind, config, size)


def gone(pid):
    """Whether a process has ended, within some seconds."""
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if stat.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def fails(engine, deadline=20.0):
    """Execute some steps, then wait until the engine says that it has failed; what it says."""
    until = time.monotonic() + deadline
    try:
        engine.execute(Plan(0, 0, 1, rows(0), b"\5\0\0\0", new=[new(0)])).wait()
        for step in range(2, 8):
            engine.execute(Plan(0, 0, step, rows(0))).wait()
        while time.monotonic() < until:
            engine.beat()
            time.sleep(0.02)
    except EngineFailed as error:
        return str(error)
    raise AssertionError("it goes on")


def test_all_ranks_execute_and_the_first_reports(loaded):
    engine, here = loaded(), SimulatedEngine(FAST)
    here.load(lambda stage, fraction: None)
    plans = [Plan(0, 0, 1, rows(0), b"\5\0\0\0", new=[new(0)]), *(Plan(0, 0, k, rows(0)) for k in range(2, 6))]
    for plan in plans:
        assert engine.execute(plan).wait().tokens.tolist() == here.execute(plan).wait().tokens.tolist()
    until = time.monotonic() + 10
    while [shown.steps for shown in engine.shown()] != [5, 5, 5] and time.monotonic() < until:
        time.sleep(0.01)
    assert [shown.steps for shown in engine.shown()] == [5, 5, 5]


@pytest.mark.parametrize("victim", [0, 2])
def test_the_death_of_a_rank_ends_all(loaded, victim):
    engine = loaded()
    pids = [rank.pid for rank in engine.ranks]
    os.kill(pids[victim], signal.SIGKILL)
    assert fails(engine) == f"rank {victim} was ended by SIGKILL"
    assert all(gone(pid) for pid in pids)
    with pytest.raises(EngineFailed, match="SIGKILL"):
        engine.beat()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_shows_no_sign_of_life_ends_all(loaded, monkeypatch, victim):
    monkeypatch.setattr(ranks, "SILENCE_S", 1.0)
    engine = loaded()
    pids = [rank.pid for rank in engine.ranks]
    os.kill(pids[victim], signal.SIGSTOP)
    assert "no sign of life" in fails(engine)
    assert all(gone(pid) for pid in pids)


def test_a_start_that_fails_says_why_and_leaves_nothing():
    engine = RankedEngine("torch", EngineConfig(model="/no-such-model", device="cpu"), 2)
    with pytest.raises(StartError, match="no-such-model"):
        engine.load(lambda stage, fraction: None)
    assert all(gone(rank.pid) for rank in engine.ranks)
    engine.close()


async def test_a_worker_replaces_all_ranks_when_one_dies(redis_url, bus):
    config = WorkerConfig(
        redis_url=redis_url, served_model_name=MODEL, name="w0", engine="simulated", tensor_parallel_size=2
    )
    engine = make_engine(config)
    assert isinstance(engine, RankedEngine)
    worker = asyncio.ensure_future(run_worker(config, engine=engine, signals=False))
    scheduler = ScriptedScheduler(bus)
    await scheduler.lead()
    await scheduler.adopt("w0")
    pids = [rank.pid for rank in engine.ranks]
    os.kill(pids[1], signal.SIGKILL)
    await scheduler.adopt("w0", beyond=scheduler.gen)
    assert all(gone(pid) for pid in pids)
    rid = await scheduler.admit(b".")
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.done()
    assert len(await scheduler.frames(rid)) == 1
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


ORPHANS = """
import os, signal
from workers.engines.ranks import RankedEngine
from workers.engines.simulated import SimulatedConfig
engine = RankedEngine("simulated", SimulatedConfig(), 2)
engine.load(lambda stage, fraction: None)
print(*(rank.pid for rank in engine.ranks), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel, elsewhere the closed socket must do")
def test_ranks_die_with_their_worker():
    done = subprocess.run([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, check=False)
    assert all(gone(int(pid)) for pid in done.stdout.split())
    assert len(done.stdout.split()) == 2
