"""The worker service with the simulated engine, driven over a real server by a scripted scheduler.

Over 400 lines: one worker's life in its order, on one fixture.
"""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
import redis
from aiohttp import web
from aiohttp.test_utils import TestServer

from protocol.errors import EngineFailed, Fenced, StartError
from protocol.messages import Plan, Terminal, choice_seed, decode_frames, encode, unpack_ids
from tests.bus import Bus
from tests.conftest import MODEL
from tests.workers.scripted import ScriptedScheduler, until
from workers import interruption, service, session
from workers.engine_thread import Ticket
from workers.engines.base import Engine, Sampled
from workers.engines.simulated import GOLDEN, SimulatedConfig, SimulatedEngine, _mix
from workers.service import Worker, WorkerConfig, run_worker

FAST = {"step_us": 200.0, "token_us": 0.0, "row_us": 0.0, "num_blocks": 8192}


class Running:
    """Workers of one test, each in a task of this loop with a bus of its own."""

    def __init__(self, redis_url: str) -> None:
        self.redis_url = redis_url
        self.workers: dict[str, Worker] = {}
        self.tasks: dict[str, asyncio.Task[int]] = {}

    async def start(self, name: str = "w0", engine: Engine | None = None, **fields: Any) -> Worker:
        config = WorkerConfig(
            redis_url=self.redis_url, served_model_name=MODEL, name=name, engine="simulated",
            engine_options=dict(FAST), **fields,
        )  # fmt: skip
        bus = Bus(self.redis_url, MODEL)
        await bus.connect()
        worker = self.workers[name] = Worker(config, bus, engine or service.make_engine(config), lambda *_: None)
        self.tasks[name] = asyncio.ensure_future(worker.run())
        return worker

    async def stop(self) -> None:
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        for worker in self.workers.values():
            await worker.bus.close()

    async def ended(self, name: str = "w0") -> int:
        async with asyncio.timeout(60):
            return await self.tasks[name]


@pytest.fixture
async def running(redis_url: str, bus: Bus) -> AsyncIterator[Running]:
    made = Running(redis_url)
    yield made
    await made.stop()


@pytest.fixture
async def scheduler(bus: Bus) -> ScriptedScheduler:
    made = ScriptedScheduler(bus)
    await made.lead()
    return made


def expected(rid_seed: int, prompt: bytes, count: int) -> list[int]:
    """The tokens that the simulated engine gives to a sequence, from an engine that runs it alone."""
    key = np.uint64(choice_seed(rid_seed, 0))
    positions = np.arange(len(prompt), len(prompt) + count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return [int(32 + t) for t in _mix(key + positions * GOLDEN) % np.uint64(95)]


async def test_tokens_are_journaled_and_every_step_is_hinted(running: Running, scheduler: ScriptedScheduler) -> None:
    await running.start()
    worker = await scheduler.adopt("w0")
    assert worker.capacity is not None
    assert (worker.capacity.model, worker.capacity.engine) == (MODEL, "simulated")
    rid = await scheduler.admit(b"hello", seed=9, max_tokens=6)
    await scheduler.plan({0: 3}, new=[await scheduler.seat(0, rid)], samples=b"\0")
    await scheduler.plan({0: 2})
    await scheduler.decode(0, steps=8)  # past its end: the last rows are thrown away
    hints = await scheduler.done()
    frames = await scheduler.frames(rid)
    assert [f.token for f in frames] == expected(9, b"hello", 6)
    assert [f.finish for f in frames] == [None] * 5 + ["length"]
    steps = [e.hint.step for e in hints]
    assert steps == sorted(steps)
    assert steps[-1] == 10
    rows = [row for e in hints for row in e.hint.rows]
    assert [t for row in rows for t in unpack_ids(row.tokens)] == [f.token for f in frames]
    assert [row.finish for row in rows if row.finish] == ["length"]
    assert rows[-1].cursor == len(await scheduler.bus.read_journal(rid, 0))
    assert all(e.verdicts == "" for e in hints)
    record = await scheduler.record(rid)
    assert (record.open, record.ends) == (0, ["length"])


async def test_many_sequences_come_and_go(running: Running, scheduler: ScriptedScheduler) -> None:
    await running.start()
    await scheduler.adopt("w0")
    rids = [await scheduler.admit(b"p%d" % i, seed=i, max_tokens=3 + i) for i in range(8)]
    for seat, rid in enumerate(rids[:4]):
        await scheduler.plan(dict.fromkeys(range(seat), 1), new=[await scheduler.seat(seat, rid)])
    await scheduler.decode(0, 1, 2, 3, steps=8)
    await scheduler.plan(frees=[0, 1, 2, 3], new=[await scheduler.seat(s, r) for s, r in enumerate(rids[4:])])
    await scheduler.decode(0, 1, 2, 3, steps=11)
    await scheduler.done()
    for i, rid in enumerate(rids):
        assert [f.token for f in await scheduler.frames(rid)] == expected(i, b"p%d" % i, 3 + i)


async def test_a_step_that_stands_twice_in_the_stream_runs_once(
    running: Running, scheduler: ScriptedScheduler, raw: redis.Redis
) -> None:
    """The plan script refuses repeats; the worker does not rely on it."""
    await running.start()
    await scheduler.adopt("w0")
    rid = await scheduler.admit(seed=3)
    plan = await scheduler.plan(new=[await scheduler.seat(0, rid)])
    raw.xadd(scheduler.bus.keys.plans("w0"), {"p": encode(plan)})
    await scheduler.decode(0, steps=2)
    raw.xadd(scheduler.bus.keys.plans("w0"), {"p": encode(plan)})
    await scheduler.decode(0)
    await scheduler.done()
    assert [f.token for f in await scheduler.frames(rid)] == expected(3, b"prompt", 4)


async def test_the_scheduler_ends_a_sequence(running: Running, scheduler: ScriptedScheduler) -> None:
    await running.start()
    await scheduler.adopt("w0")
    rid = await scheduler.admit(max_tokens=50)
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.decode(0, steps=2)
    await scheduler.plan(ends=[(0, "abort")])
    hints = await scheduler.done()
    frames = await scheduler.frames(rid)
    assert [f.finish for f in frames] == [None, None, None, "abort"]
    assert frames[-1].token is None
    rows = [row for e in hints for row in e.hint.rows]
    assert (rows[-1].seat, rows[-1].finish) == (0, "abort")
    assert sum(len(unpack_ids(row.tokens)) for row in rows) == 3
    assert (await scheduler.record(rid)).open == 0


async def test_a_terminal_result_is_written(running: Running, scheduler: ScriptedScheduler, bus: Bus) -> None:
    await running.start()
    await scheduler.adopt("w0")
    rid = await scheduler.admit(max_tokens=4, results="jobs-done")
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.decode(0, steps=3)
    await scheduler.done()
    ((_, result),) = await bus.read_results("jobs-done")
    text = "".join(f.text for f in await scheduler.frames(rid))
    assert result == Terminal(rid=rid, finish_reason="length", text=text, prompt_tokens=6, completion_tokens=4)


async def test_steps_that_pile_up_behind_a_commit_go_in_one(
    running: Running, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, commits = asyncio.Event(), []
    commit = Bus.commit

    async def slow(self: Bus, *args: Any, **named: Any) -> str:
        commits.append(args[4].step)
        if len(commits) == 1:
            await gate.wait()
        return await commit(self, *args, **named)

    monkeypatch.setattr(Bus, "commit", slow)
    worker = await running.start()
    await scheduler.adopt("w0")
    rids = [await scheduler.admit(seed=s) for s in (1, 2)]
    await scheduler.plan(new=[await scheduler.seat(s, r) for s, r in enumerate(rids)])
    await scheduler.decode(0, 1, steps=9)

    async def all_executed() -> bool:
        return worker.device.steps == 10

    await until(all_executed, "ten steps")
    gate.set()
    hints = await scheduler.done()
    assert len(commits) < 10
    assert [e.hint.step for e in hints] == commits
    assert sum(len(unpack_ids(row.tokens)) for e in hints for row in e.hint.rows) == 20
    assert any(len(unpack_ids(row.tokens)) > 1 for e in hints for row in e.hint.rows)
    for seed, rid in zip((1, 2), rids, strict=True):
        assert [f.token for f in await scheduler.frames(rid)] == expected(seed, b"prompt", 10)


async def test_executed_plans_are_trimmed(running: Running, scheduler: ScriptedScheduler, raw: redis.Redis) -> None:
    await running.start()
    await scheduler.adopt("w0")
    rid = await scheduler.admit()
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.decode(0, steps=20)
    await scheduler.done()
    assert raw.xlen(scheduler.bus.keys.plans("w0")) == 0


# ---------------------------------------------------------------- moves


async def test_a_sequence_that_moves_goes_on_as_if_it_had_stayed(
    running: Running, scheduler: ScriptedScheduler
) -> None:
    """Its journal equals that of a twin that stayed, stop strings and half characters included."""
    await running.start("w0")
    await running.start("w1")
    fields = {"seed": 4, "max_tokens": 12, "stop": ["zz", "~!~"]}
    twin, rid = await scheduler.admit(**fields), await scheduler.admit(**fields)
    await scheduler.adopt("w0")
    await scheduler.plan(new=[await scheduler.seat(0, twin), await scheduler.seat(1, rid)])
    await scheduler.decode(0, 1, steps=3)
    await scheduler.decode(0, steps=8)
    await scheduler.done()
    assert len(await scheduler.frames(rid)) == 4
    await scheduler.plan(frees=[0, 1])

    await scheduler.adopt("w1")
    await scheduler.plan(new=[await scheduler.seat(3, rid, placement=2)])
    await scheduler.decode(3, steps=7)
    await scheduler.done()
    assert await scheduler.bus.read_journal(rid, 0) == await scheduler.bus.read_journal(twin, 0)
    assert (await scheduler.record(rid)).ends == ["length"]


async def test_rows_of_a_sequence_that_was_placed_elsewhere_are_stale_and_end_here(
    running: Running, scheduler: ScriptedScheduler
) -> None:
    worker = await running.start("w0")
    await running.start("w1")
    elsewhere = (await scheduler.adopt("w1")).gen
    await scheduler.adopt("w0")
    rid, other = await scheduler.admit(seed=1), await scheduler.admit(seed=2)
    await scheduler.plan(new=[await scheduler.seat(0, rid), await scheduler.seat(1, other)])
    await scheduler.done()
    new = await scheduler.seat(0, rid, placement=2)
    await scheduler.bus.plan(scheduler.epoch, "w1", elsewhere, Plan(scheduler.epoch, elsewhere, 1, new=[new]))
    await scheduler.decode(0, 1, steps=3)
    hints = await scheduler.done()
    assert {e.verdicts for e in hints} == {"", "sl"}
    assert len(await scheduler.frames(rid)) == 1
    assert [f.token for f in await scheduler.frames(other)] == expected(2, b"prompt", 4)
    assert worker.metrics.refused._value.get() == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(3))
async def test_lost_replies_and_connections_change_nothing(
    running: Running, scheduler: ScriptedScheduler, seed: int
) -> None:
    """A third of the worker's calls lose their reply after the server acted, a third of the rest the call itself."""
    worker = await running.start()
    await scheduler.adopt("w0")
    link: Any = worker.bus._link
    whole, draw = link.once, random.Random(seed)

    async def once(*args: Any) -> Any:
        if draw.random() < 0.3:
            raise ConnectionError("lost before it was sent")
        replies = await whole(*args)
        if draw.random() < 0.3:
            raise ConnectionError("lost with its reply")
        return replies

    link.once = once
    rids = [await scheduler.admit(seed=s, max_tokens=20) for s in range(3)]
    await scheduler.plan(new=[await scheduler.seat(s, r) for s, r in enumerate(rids)])
    await scheduler.decode(0, 1, 2, steps=25)
    hints = await scheduler.done()
    for s, rid in enumerate(rids):
        assert [f.token for f in await scheduler.frames(rid)] == expected(s, b"prompt", 20)
    assert all(e.verdicts == "" for e in hints)
    assert worker.metrics.fenced._value.get() == 0  # type: ignore[attr-defined]


# ---------------------------------------------------------------- fences


async def test_a_retired_worker_drops_everything_and_registers_anew(
    running: Running, scheduler: ScriptedScheduler
) -> None:
    worker = await running.start()
    first = await scheduler.adopt("w0")
    rid = await scheduler.admit(seed=6, max_tokens=5)
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.done()
    await scheduler.bus.retire(scheduler.epoch, "w0", scheduler.gen)
    with pytest.raises(Fenced):
        await scheduler.decode(0)
    second = await scheduler.adopt("w0", beyond=first.gen)
    assert second.gen > first.gen
    await scheduler.plan(new=[await scheduler.seat(0, rid, placement=2)])  # the same seat on an empty engine
    await scheduler.decode(0, steps=3)
    await scheduler.done()
    assert [f.token for f in await scheduler.frames(rid)] == expected(6, b"prompt", 5)
    assert worker.state == "serving"


async def test_a_new_leaders_plans_start_on_an_empty_engine(running: Running, scheduler: ScriptedScheduler) -> None:
    await running.start()
    await scheduler.adopt("w0")
    rid, lost = await scheduler.admit(seed=6, max_tokens=5), await scheduler.admit(seed=7)
    await scheduler.plan(new=[await scheduler.seat(0, rid), await scheduler.seat(1, lost)])
    await scheduler.done()
    heir = ScriptedScheduler(scheduler.bus, "heir")
    await heir.lead()
    heir.wid, heir.gen = "w0", scheduler.gen
    with pytest.raises(Fenced):
        await scheduler.decode(0)
    await heir.plan(new=[await heir.seat(0, rid, placement=2)])
    await heir.decode(0, steps=3)
    await until(lambda: _ended(heir, rid), "the sequence ends")
    assert [f.token for f in await heir.frames(rid)] == expected(6, b"prompt", 5)
    assert len(await heir.frames(lost)) == 1


async def _ended(scheduler: ScriptedScheduler, rid: str) -> bool:
    return (await scheduler.record(rid)).open == 0


async def test_steps_under_way_at_a_change_of_leaders_are_dropped(
    running: Running, scheduler: ScriptedScheduler
) -> None:
    """Old plans still queued at the device when the lead changes leave no trace: not in the journal, not in hints."""
    engine = Gated()
    worker = await running.start(engine=engine)
    await scheduler.adopt("w0")
    rid = await scheduler.admit(seed=8, max_tokens=6)
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    engine.allow(1)
    await scheduler.done()
    await scheduler.decode(0, steps=5)

    async def queued() -> bool:
        return worker.device.busy

    await until(queued, "steps at the device")
    heir = ScriptedScheduler(scheduler.bus, "heir")
    await heir.lead()
    heir.wid, heir.gen = "w0", scheduler.gen
    await heir.plan(new=[await heir.seat(0, rid, placement=2)])
    engine.allow(1)  # of the old term: committed under the old epoch, refused
    await heir.decode(0, steps=4)
    engine.allow(100)
    await until(lambda: _ended(heir, rid), "the sequence ends")
    assert [f.token for f in await heir.frames(rid)] == expected(8, b"prompt", 6)


async def test_a_result_that_crossed_with_a_fence_is_dropped(running: Running, scheduler: ScriptedScheduler) -> None:
    """It left the device thread before the fence and reached the event loop after it."""
    worker = await running.start()
    await scheduler.adopt("w0")
    rid = await scheduler.admit(seed=1, max_tokens=2)
    plan = await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.done()
    held: Any = worker._session
    late = Sampled(np.array([0], np.int32), np.array([65], np.int32), {})
    worker._deliver(Ticket(held.engine_run - 1, "0-1", plan), late, 0)
    await scheduler.decode(0)
    await scheduler.done()
    assert [f.token for f in await scheduler.frames(rid)] == expected(1, b"prompt", 2)


async def test_missing_plans_make_the_worker_register_anew(running: Running, scheduler: ScriptedScheduler) -> None:
    await running.start()
    first = await scheduler.adopt("w0")
    scheduler.step += 1
    await scheduler.plan()
    await scheduler.adopt("w0", beyond=first.gen)


class Gated(SimulatedEngine):
    """Executes only as many steps as it has been allowed to; the beat stands still meanwhile."""

    overlaps = False

    def __init__(self) -> None:
        super().__init__(SimulatedConfig(**FAST))  # type: ignore[arg-type]
        self.gate = threading.Semaphore(0)
        self.fault: Exception | None = None

    def allow(self, steps: int) -> None:
        self.gate.release(steps)

    def execute(self, plan: Plan) -> Any:
        self.gate.acquire()
        if self.fault is not None:
            raise self.fault
        return super().execute(plan)


# ---------------------------------------------------------------- beats, failures, the end


async def beat_of(scheduler: ScriptedScheduler) -> int:
    return next(w.beat for w in await scheduler.bus.list_workers() if w.wid == "w0")


async def test_a_hung_step_stops_the_beats_and_they_come_back_with_it(
    running: Running, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "HEARTBEAT_S", 0.02)
    engine = Gated()
    worker = await running.start(engine=engine)
    await scheduler.adopt("w0")
    idle = await beat_of(scheduler)
    await until(lambda: _beyond(scheduler, idle), "beats of an idle worker")

    rid = await scheduler.admit()
    await scheduler.plan(new=[await scheduler.seat(0, rid)])

    async def noticed() -> bool:
        return worker._stalled_since is not None

    await until(noticed, "the stall is noticed")
    hung = await beat_of(scheduler)
    for _ in range(10):
        await asyncio.sleep(0.02)
    assert await beat_of(scheduler) == hung
    engine._beats += 1  # a layer of a long step
    await until(lambda: _beyond(scheduler, hung), "a beat from progress within the step")
    hung = await beat_of(scheduler)
    engine.allow(1)
    await scheduler.done()
    await until(lambda: _beyond(scheduler, hung + 1), "beats after the step")


async def _beyond(scheduler: ScriptedScheduler, beat: int) -> bool:
    return await beat_of(scheduler) > beat


async def test_a_step_that_hangs_for_too_long_ends_the_process(
    running: Running, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "HEARTBEAT_S", 0.02)
    await running.start(engine=Gated(), stall_timeout=0.1)
    await scheduler.adopt("w0")
    rid = await scheduler.admit()
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    with pytest.raises(EngineFailed, match="no progress"):
        await running.ended()


async def test_a_worker_whose_step_hangs_is_not_offered_again(
    running: Running, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retired while its device hangs, it registers anew only once the step has come to its end."""
    monkeypatch.setattr(session, "HEARTBEAT_S", 0.02)
    engine = Gated()
    worker = await running.start(engine=engine)
    first = await scheduler.adopt("w0")
    rid = await scheduler.admit(seed=1, max_tokens=3)
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.plan({0: 1})

    async def noticed() -> bool:
        return worker._stalled_since is not None

    await until(noticed, "the stall is noticed")
    await scheduler.bus.retire(scheduler.epoch, "w0", first.gen)
    engine._beats += 1  # a last sign of life: the beat that it allows is fenced
    fenced = worker.metrics.fenced._value  # type: ignore[attr-defined]

    async def was_fenced() -> bool:
        return fenced.get() == 1

    await until(was_fenced, "the worker finds itself fenced")
    assert await scheduler.bus.list_workers() == []
    engine.allow(100)
    await scheduler.adopt("w0", beyond=first.gen)
    await scheduler.plan(new=[await scheduler.seat(0, rid, placement=2)])
    await scheduler.decode(0, steps=2)
    await scheduler.done()
    assert [f.token for f in await scheduler.frames(rid)] == expected(1, b"prompt", 3)


async def test_an_engine_that_fails_ends_the_process(
    running: Running, scheduler: ScriptedScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Gated()
    engine.fault = RuntimeError("device lost")
    engine.allow(1)
    await running.start(engine=engine)
    await scheduler.adopt("w0")
    await scheduler.plan()
    assert await running.ended() != 0
    assert "RuntimeError: device lost" in caplog.text


async def test_a_result_for_an_unknown_seat_ends_the_process(running: Running, scheduler: ScriptedScheduler) -> None:
    class Confused(SimulatedEngine):
        def _sample(self, seats: Any) -> Any:
            sampled = super()._sample(seats)
            sampled.seats = sampled.seats + 1
            return sampled

    await running.start(engine=Confused(SimulatedConfig(**FAST)))  # type: ignore[arg-type]
    await scheduler.adopt("w0")
    rid = await scheduler.admit()
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    assert await running.ended() != 0


async def test_a_load_that_fails_says_why(running: Running) -> None:
    class Unloadable(SimulatedEngine):
        def load(self, progress: Callable[[str, float], None]) -> Any:
            raise StartError("no such model")

    await running.start(engine=Unloadable(SimulatedConfig()))
    with pytest.raises(StartError, match="no such model"):
        await running.ended()


async def test_a_worker_retired_while_it_loads_registers_anew(
    running: Running, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "HEARTBEAT_S", 0.02)
    loaded = threading.Event()

    class Slow(SimulatedEngine):
        def load(self, progress: Callable[[str, float], None]) -> Any:
            progress("warm-up", 0.5)
            loaded.wait(60)
            return super().load(progress)

    await running.start(engine=Slow(SimulatedConfig(**FAST)))  # type: ignore[arg-type]

    async def warming() -> int:
        return next((w.gen for w in await scheduler.bus.list_workers() if w.state == "warming"), 0)

    gen = await until(warming, "the worker tells that it warms up")
    await scheduler.bus.retire(scheduler.epoch, "w0", gen)
    await until(lambda: _another_gen(scheduler, gen), "another gen")
    loaded.set()
    await scheduler.adopt("w0", beyond=gen)


async def _another_gen(scheduler: ScriptedScheduler, gen: int) -> bool:
    return any(w.gen > gen for w in await scheduler.bus.list_workers())


async def test_draining_goes_on_until_the_sequences_have_ended(running: Running, scheduler: ScriptedScheduler) -> None:
    worker = await running.start()
    await scheduler.adopt("w0")
    rid = await scheduler.admit(seed=2, max_tokens=6)
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.done()
    worker.draining.set()

    async def draining() -> bool:
        return any(w.state == "draining" for w in await scheduler.bus.list_workers())

    await until(draining, "the scheduler sees that it drains")
    await scheduler.decode(0, steps=5)
    assert await running.ended() == 0
    assert [f.token for f in await scheduler.frames(rid)] == expected(2, b"prompt", 6)


async def test_a_draining_worker_leaves_when_it_is_retired(running: Running, scheduler: ScriptedScheduler) -> None:
    worker = await running.start()
    await scheduler.adopt("w0")
    rid = await scheduler.admit()
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.done()
    worker.draining.set()
    await scheduler.bus.retire(scheduler.epoch, "w0", scheduler.gen)  # its sequence was moved
    assert await running.ended() == 0


async def test_draining_has_an_end(running: Running, scheduler: ScriptedScheduler) -> None:
    worker = await running.start(drain_timeout=0.2)
    await scheduler.adopt("w0")
    rid = await scheduler.admit()
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.done()
    worker.draining.set()
    assert await running.ended() == 0


async def test_metrics_and_health(
    running: Running, scheduler: ScriptedScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="headrace.worker")
    await running.start(metrics_port=0)
    await scheduler.adopt("w0")
    rid = await scheduler.admit(max_tokens=3)
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.decode(0, steps=2)
    await scheduler.done()
    url = next(r.getMessage() for r in caplog.records if "metrics on" in r.getMessage()).removeprefix("metrics on ")
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as reply:
            text = await reply.text()
        async with session.get(url.replace("/metrics", "/health")) as reply:
            health = msgspec.json.decode(await reply.read())
            assert reply.status == 200
    label = f'{{model="{MODEL}",worker="w0"}}'
    assert f"headrace_worker_tokens_total{label} 3.0" in text
    assert f"headrace_step_tokens_sum{label} 8.0" in text
    assert f"headrace_step_seconds_count{label} 3.0" in text
    assert f'headrace_worker_path_info{{model="{MODEL}",path="simulated",worker="w0"}} 1.0' in text
    assert any("path of a pass: simulated" in record.getMessage() for record in caplog.records)
    assert health == {"ok": True, "state": "serving", "stalled": False}


async def test_prompts_and_tokens_stay_out_of_the_log(
    running: Running, scheduler: ScriptedScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    await running.start()
    await scheduler.adopt("w0")
    rid = await scheduler.admit(b"my secret", seed=12, max_tokens=8)
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.decode(0, steps=7)
    await scheduler.done()
    text = "".join(f.text for f in decode_frames(await scheduler.bus.read_journal(rid, 0)))
    assert "secret" not in caplog.text
    assert text not in caplog.text


async def test_run_worker_checks_its_name(redis_url: str) -> None:
    with pytest.raises(Exception, match="name must match"):
        await run_worker(WorkerConfig(redis_url=redis_url, served_model_name=MODEL, name="a b"), signals=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": "steam"}, "must be torch or simulated"),
        ({"engine": "torch"}, "pass --model"),
        ({"engine": "simulated", "engine_options": {"pace": 1}}, "pace"),
    ],
)
def test_a_configuration_that_cannot_work_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(StartError, match=message):
        service.make_engine(WorkerConfig(redis_url="", served_model_name=MODEL, **fields))


# ---------------------------------------------------------------- interruption notices


@pytest.mark.parametrize("session_tokens", [False, True])
async def test_an_interruption_notice_drains(
    running: Running, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch, session_tokens: bool
) -> None:
    """A metadata service as AWS has it: 404 until the notice; with IMDSv2 only for those who fetched a token."""
    monkeypatch.setattr(interruption.wait_for_notice, "__defaults__", (0.02,))
    answers: list[int] = []
    doomed = asyncio.Event()

    async def notice(request: web.Request) -> web.Response:
        if session_tokens and request.headers.get("X-aws-ec2-metadata-token") != "t0k3n":
            answers.append(401)
        else:
            answers.append(200 if doomed.is_set() else 404)
        return web.Response(status=answers[-1])

    async def token(request: web.Request) -> web.Response:
        assert int(request.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        return web.Response(text="t0k3n")

    app = web.Application()
    app.add_routes([web.get("/latest/meta-data/spot/instance-action", notice), web.put("/latest/api/token", token)])
    async with TestServer(app) as server:
        url = str(server.make_url("/latest/meta-data/spot/instance-action"))
        worker = await running.start(interruption_notice_url=url)
        await scheduler.adopt("w0")
        await until(lambda: _answered(answers, 404), "a first poll")
        assert not worker.draining.is_set()
        doomed.set()
        assert await running.ended() == 0
    assert (401 in answers) == session_tokens


async def _answered(answers: list[int], status: int) -> bool:
    return status in answers


async def test_a_file_may_be_the_notice(
    running: Running, scheduler: ScriptedScheduler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(interruption.wait_for_notice, "__defaults__", (0.02,))
    worker = await running.start(interruption_notice_url=str(tmp_path / "notice"))
    await scheduler.adopt("w0")
    assert not worker.draining.is_set()
    (tmp_path / "notice").touch()
    assert await running.ended() == 0


# ---------------------------------------------------------------- the process

ALONE = """
import asyncio, logging, sys
from workers.service import WorkerConfig, run_worker
logging.basicConfig(level="INFO")
config = WorkerConfig(redis_url=sys.argv[1], served_model_name=sys.argv[2], name="w0", engine="simulated")
code = asyncio.run(run_worker(config))
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(code)
"""


async def test_sigterm_drains_a_process_that_never_imported_torch(redis_url: str, scheduler: ScriptedScheduler) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ALONE, redis_url, MODEL, stderr=asyncio.subprocess.PIPE
    )
    await scheduler.adopt("w0")
    rid = await scheduler.admit(seed=5, max_tokens=4)
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.done()
    process.send_signal(signal.SIGTERM)
    await scheduler.decode(0, steps=3)
    _, log = await process.communicate()
    assert process.returncode == 0, log.decode()
    assert [f.token for f in await scheduler.frames(rid)] == expected(5, b"prompt", 4)


async def test_a_second_sigterm_ends_at_once(redis_url: str, scheduler: ScriptedScheduler) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ALONE, redis_url, MODEL, stderr=asyncio.subprocess.PIPE
    )
    await scheduler.adopt("w0")
    rid = await scheduler.admit()
    await scheduler.plan(new=[await scheduler.seat(0, rid)])
    await scheduler.done()
    process.send_signal(signal.SIGTERM)

    async def draining() -> bool:
        return any(w.state == "draining" for w in await scheduler.bus.list_workers())

    await until(draining, "the worker drains")
    process.send_signal(signal.SIGTERM)
    await process.communicate()
    assert process.returncode not in (0, None)
