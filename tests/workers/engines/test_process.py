"""An engine in a child process keeps the protocol: the same tokens, errors with their class and text, one fate."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from protocol.errors import EngineFailed, ModelRefused, StartError
from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from protocol.structures.structure import Structure
from tests.conftest import MODEL
from tests.models import tiny_model
from tests.workers.plan_maker import PlanMaker, Sequence
from tests.workers.scripted import ScriptedScheduler
from tests.workers.torch_engine.parity import first_difference, reference_of
from workers.engines.process import ProcessEngine
from workers.engines.simulated import SimulatedConfig, SimulatedEngine
from workers.service import WorkerConfig, make_engine, run_worker
from workers.torch_engine.config import EngineConfig


@pytest.fixture
def loaded():
    """Makes and loads engines; ends their children."""
    made = []

    def make(kind, config, progress=lambda stage, fraction: None):
        engine = ProcessEngine(kind, config)
        made.append(engine)
        engine.capacity = engine.load(progress)
        return engine

    yield make
    for engine in made:
        engine.close()


FAST = SimulatedConfig(step_us=200, token_us=0, row_us=0)


def new(seat, ids=range(5), **fields):
    params = SamplingParams(max_tokens=8, **fields)
    return NewSequence(seat, "r", 0, 1, pack_ids(ids), len(ids), params, 11, 0, pack_ids([seat]), 0)


def rows(*seats):
    return np.array(seats, "<u2").tobytes()


def test_the_same_steps_give_the_same_tokens_here_and_there(loaded):
    away, here = loaded("simulated", FAST), SimulatedEngine(FAST)
    capacity = here.load(lambda stage, fraction: None)
    assert away.capacity == capacity
    assert list(away.eos_token_ids) == list(here.eos_token_ids)
    plans = [Plan(0, 0, 1, rows(0, 1), pack_ids([5, 5]), new=[new(0), new(1, logprobs=2)])]
    plans += [Plan(0, 0, step, rows(0, 1)) for step in range(2, 6)]
    outputs = [away.execute(plan) for plan in plans]  # all of them before the first is waited for
    for plan, output in zip(plans, outputs, strict=True):
        ours, theirs = output.wait(), here.execute(plan).wait()
        assert ours.seats.tolist() == theirs.seats.tolist()
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.exec_us == theirs.exec_us
        assert ours.logprobs.keys() == theirs.logprobs.keys() == {1}
        assert ours.logprobs[1][0] == theirs.logprobs[1][0]
        assert ours.logprobs[1][1].tolist() == theirs.logprobs[1][1].tolist()
    away.reset()
    again = away.execute(plans[0]).wait()
    here.reset()
    assert again.tokens.tolist() == here.execute(plans[0]).wait().tokens.tolist()


def test_constrained_rows_and_their_failures_come_through(loaded):
    away, here = loaded("simulated", FAST), SimulatedEngine(FAST)
    here.load(lambda stage, fraction: None)
    ruled = new(0, structure=Structure(regex="(yes|no)+"))
    broken = new(1, structure=Structure(regex="(unclosed"))
    plans = [Plan(0, 0, 1, rows(0, 1, 2), pack_ids([5] * 3), new=[ruled, broken, new(2)])]
    plans += [Plan(0, 0, step, rows(0, 2)) for step in range(2, 6)]
    outputs = [away.execute(plan) for plan in plans]
    text = []
    for plan, output in zip(plans, outputs, strict=True):
        ours, theirs = output.wait(), here.execute(plan).wait()
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        assert ours.failed == theirs.failed
        text.append(chr(ours.tokens[0]))
        assert (ours.failed.get(1) is not None) == (plan is plans[0])
    assert "".join(text)[:2] in ("ye", "no")


def test_the_beat_and_the_progress_come_through(loaded):
    told = []
    engine = loaded("simulated", FAST, lambda stage, fraction: told.append((stage, fraction)))
    assert told[0] == ("load", 0.0)
    assert told[-1] == ("load", 1.0)
    before = engine.beat()
    engine.execute(Plan(0, 0, 1, rows(0), pack_ids([5]), new=[new(0)])).wait()
    deadline = time.monotonic() + 10
    while engine.beat() == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.beat() > before


def test_a_torch_engine_in_a_child_serves_what_transformers_gives(loaded, tmp_path_factory):
    path = tiny_model(tmp_path_factory, "llama")
    config = EngineConfig(
        model=str(path), device="cpu", max_model_len=96, max_num_seqs=4, max_num_batched_tokens=32,
        kv_cache_memory=8 << 20, block_size=8, threads=1,
    )  # fmt: skip
    engine = loaded("torch", config)
    assert engine.tokenizer.decode([97, 98]) == "ab"
    assert engine.path == "whole pass"
    served = [Sequence(list(range(k, k + 9 + k)), SamplingParams(temperature=0, max_tokens=8)) for k in range(4)]
    PlanMaker(engine, blocks=40, block_size=8, budget=16, seats=8).run(served)
    reference = reference_of(path)
    assert [first_difference(reference, request) for request in served] == [None] * 4


def test_what_the_child_raises_keeps_its_class_and_text(loaded, tmp_path_factory):
    with pytest.raises(StartError, match="no-such-model"):
        loaded("torch", EngineConfig(model="/no-such-model", device="cpu"))
    with pytest.raises(ModelRefused, match="mamba"):
        loaded("torch", EngineConfig(model=str(tiny_model(tmp_path_factory, "mamba")), device="cpu"))


def test_a_step_that_cannot_be_ends_the_engine_with_its_reason(loaded, capfd):
    engine = loaded("simulated", FAST)
    output = engine.execute(Plan(0, 0, 1, rows(0), pack_ids([9]), new=[new(0)]))
    with pytest.raises(EngineFailed, match="ValueError: plan: a row computes tokens that are not known"):
        output.wait()


def test_the_death_of_the_child_is_told(loaded):
    engine = loaded("simulated", FAST)
    output = engine.execute(Plan(0, 0, 1, rows(0), pack_ids([5]), new=[new(0)]))
    output.wait()
    os.kill(engine._child.pid, signal.SIGKILL)

    def further():
        for step in range(2, 100):
            engine.execute(Plan(0, 0, step, rows(0))).wait()

    with pytest.raises(EngineFailed, match="SIGKILL"):
        further()


ENDS, HANGS, GOOD = b"!", b"?", b"."  # prompts, and what the engine does about them


@pytest.fixture
async def running(redis_url, bus):
    """A scheduler that leads, and a worker with an engine process that ends or hangs on command."""
    failures = {str(ENDS[0]): "end", str(HANGS[0]): "hang"}
    engine = ProcessEngine("simulated", dataclasses.replace(FAST, fail_rows=failures))
    config = WorkerConfig(
        redis_url=redis_url, served_model_name=MODEL, name="w0", engine="simulated", stall_timeout=0.5
    )
    worker = asyncio.ensure_future(run_worker(config, engine=engine, signals=False))
    scheduler = ScriptedScheduler(bus)
    await scheduler.lead()
    await scheduler.adopt("w0")
    yield scheduler, worker, engine
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


async def ask(scheduler, prompt):
    """Plan its first step; returns its request id."""
    rid = await scheduler.admit(prompt)
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    return rid


async def test_an_engine_that_ends_or_hangs_is_replaced_under_a_new_generation(running):
    """As often as it happens, since each of them has served steps before."""
    scheduler, worker, engine = running
    for fatal in (HANGS, ENDS, ENDS, ENDS):
        served = await ask(scheduler, GOOD)
        await scheduler.done()
        assert len(await scheduler.frames(served)) == 1
        lost = await ask(scheduler, fatal)
        await scheduler.adopt("w0", beyond=scheduler.gen)
        assert await scheduler.frames(lost) == []
    assert not worker.done()
    assert engine._child.poll() == -signal.SIGKILL, "a process that hangs is ended"


async def test_the_death_of_an_idle_engine_is_seen(running):
    scheduler, worker, engine = running
    os.kill(engine._child.pid, signal.SIGKILL)
    await scheduler.adopt("w0", beyond=scheduler.gen)
    await ask(scheduler, GOOD)
    await scheduler.done()
    assert not worker.done()


async def test_after_three_ends_without_a_served_step_the_worker_ends(running):
    scheduler, worker, _ = running
    for _ in range(2):
        await ask(scheduler, ENDS)
        await scheduler.adopt("w0", beyond=scheduler.gen)
    await ask(scheduler, ENDS)
    with pytest.raises(EngineFailed, match="SIGKILL"):
        await asyncio.wait_for(worker, 30)


ORPHAN = """
import os, signal, sys
from workers.engines.process import ProcessEngine
from workers.engines.simulated import SimulatedConfig
engine = ProcessEngine("simulated", SimulatedConfig())
engine.load(lambda stage, fraction: None)
print(engine._child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel, elsewhere the closed socket must do")
def test_the_child_dies_with_its_parent():
    done = subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    child = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 10
    while child.exists() and "Z" not in child.joinpath("stat").read_text().split()[2] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not child.exists() or child.joinpath("stat").read_text().split()[2] == "Z"


def test_the_switch_of_the_worker():
    def engine(**fields):
        return make_engine(WorkerConfig(redis_url="", served_model_name="m", **fields))

    assert type(engine(engine="simulated")).__name__ == "SimulatedEngine"
    apart = engine(engine="simulated", engine_options={"process": True, "step_us": 5.0})
    assert isinstance(apart, ProcessEngine)
    assert apart.config.step_us == 5.0
    assert isinstance(engine(model="x", device="cuda"), ProcessEngine)
    assert engine(model="x", device="cuda:1", max_num_seqs=7).config.max_num_seqs == 7
