"""Schedulers and workers come and go: what was accepted ends once, with the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import redis

from protocol.messages import WIRE, Job, Plan, decode_frames, encode, new_rid, unpack_ids
from protocol.sampling import SamplingParams
from scheduler import inbox
from tests.conftest import MODEL, leaked_keys
from tests.scheduler.conftest import HASTY, PATIENCE_S, Stage
from tests.scheduler.scripted_worker import ScriptedWorker, expected_tokens

LENGTH = 60


def progressed(stage: Stage, rid: str, frames: int) -> Callable[[], Awaitable[bool]]:
    async def enough() -> bool:
        return len(decode_frames(await stage.bus.read_journal(rid, 0))) >= frames

    return enough


async def started(stage: Stage, prompts: list[str], frames: int = 5, **job: object) -> list[str]:
    """Requests of LENGTH tokens, each with some of them journaled."""
    rids = [await stage.accept(p, max_tokens=LENGTH, seed=k, job=dict(job)) for k, p in enumerate(prompts)]
    for rid in rids:
        await stage.until(progressed(stage, rid, frames))
    return rids


async def undisturbed(stage: Stage, prompts: list[str], rids: list[str]) -> None:
    """Every request ends with exactly the tokens that one worker, alone, would have drawn."""
    for k, (prompt, rid) in enumerate(zip(prompts, rids, strict=True)):
        frames = await stage.frames(rid)
        assert [f.token for f in frames] == expected_tokens(list(prompt.encode()), k, 0, LENGTH)
        assert [f.finish for f in frames if f.finish] == ["length"]
    await stage.at_rest()


def told(stage: Stage, field: str, value: float) -> Callable[[], Awaitable[bool]]:
    """Whether the leader says so to the dashboard."""

    async def so() -> bool:
        return (await stage.bus.read_depth_fields()).get(field) == value

    return so


PROMPTS = ["one", "two two", "three three three"]

# ------------------------------------------------------------------ schedulers


async def test_the_lead_is_handed_over_at_a_stop(stage: Stage, raw: redis.Redis) -> None:
    first, stop = stage.scheduler()
    worker = stage.worker(step_s=0.01)
    rids = await started(stage, PROMPTS)
    stop.set()
    assert await asyncio.wait_for(first, PATIENCE_S) == 0
    assert (await stage.bus.read_leader()).owner == ""
    stage.scheduler()
    await undisturbed(stage, PROMPTS, rids)
    assert (await stage.bus.read_leader()).epoch == 2
    assert worker.registrations == 1
    assert leaked_keys(raw) == []


async def test_a_deposed_scheduler_ends_non_zero_with_one_clear_line(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    first, _ = stage.scheduler()
    stage.worker(step_s=0.01)
    rids = await started(stage, PROMPTS)

    async def taken() -> bool:
        return await stage.bus.lead("usurper", await stage.bus.read_leader()) is not None

    await stage.until(taken)
    assert await asyncio.wait_for(first, PATIENCE_S) == 1
    errors = [r.message for r in caplog.records if r.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "deposed" in errors[0]
    assert (await stage.bus.read_leader()).owner == "usurper"
    stage.scheduler(timing=HASTY)  # the usurper never beats
    await undisturbed(stage, PROMPTS, rids)


async def test_a_standby_takes_over_from_a_killed_leader(stage: Stage, model_dir: Path) -> None:
    """A leader in a process of its own, killed: no release, no goodbye."""
    code = (
        "import asyncio, sys\n"
        "from scheduler.election import Timing\n"
        "from scheduler.service import SchedulerConfig, run_scheduler\n"
        "asyncio.run(run_scheduler(SchedulerConfig(sys.argv[1], sys.argv[2], sys.argv[3])))\n"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(model_dir), MODEL, stage.url)
    try:

        async def leads() -> bool:
            assert process.returncode is None
            return (await stage.bus.read_leader()).epoch == 1

        await stage.until(leads)
        stage.worker(step_s=0.01)
        rids = await started(stage, PROMPTS)
        second, _ = stage.scheduler(timing=HASTY)
        os.kill(process.pid, signal.SIGKILL)
        queued = await stage.accept("three", max_tokens=2)
        await undisturbed(stage, PROMPTS, rids)
        assert await stage.tokens(queued) == expected_tokens(list(b"three"), 7, 0, 2)
        assert (await stage.bus.read_leader()).epoch == 2
        assert not second.done()
        await stage.until(told(stage, "taken_over", 1))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_jobs_that_a_dead_leader_had_read_are_claimed(stage: Stage) -> None:
    epoch = await stage.bus.lead("dead", await stage.bus.read_leader())
    assert epoch == 1
    rid = await stage.accept("read and left", max_tokens=2)
    await stage.bus.push(encode(Job(prompt="pushed and left", id="p", results="r")))
    assert len(await stage.bus.read_jobs("dead", 10, 10)) == 2
    stage.scheduler(timing=HASTY)
    stage.worker()
    assert len(await stage.tokens(rid)) == 2

    async def result() -> bool:
        return len(await stage.bus.read_results("r")) == 1

    await stage.until(result)
    await stage.at_rest()


async def test_a_request_is_put_back_whose_entry_a_producer_trimmed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "STRAY_S", 0.05)
    rid = await stage.accept("trimmed", max_tokens=2)
    await stage.bus._link.command("XADD", stage.bus.keys.jobs, "MAXLEN", 1, "*", "job", "no job")
    assert await stage.bus.inbox_length() == 1
    stage.scheduler()
    stage.worker()
    assert len(await stage.tokens(rid)) == 2
    await stage.at_rest()


async def test_a_new_leader_finds_waiting_cancelled_and_half_ended_requests(stage: Stage) -> None:
    """What no worker ever saw, what was cancelled between the terms, and a request one choice of which has ended."""
    first, stop = stage.scheduler()
    worker = stage.worker(step_s=0.01)
    half = new_rid()
    sampling = SamplingParams(max_tokens=LENGTH, seed=0, n=2, stop_token_ids=[_early_stop()])
    await stage.bus.accept(Job(prompt="half", sampling=sampling), rid=half)

    async def one_ended() -> bool:
        record = await stage.bus.read_request(half)
        return record is not None and sum(end is not None for end in record.ends) == 1

    await stage.until(one_ended)
    worker.running.clear()
    waiting = await stage.accept("waiting", max_tokens=3)
    doomed = await stage.accept("doomed", max_tokens=3)
    stop.set()
    assert await first == 0
    await stage.bus.cancel(doomed, "default")
    worker.running.set()
    stage.scheduler()
    assert await stage.tokens(waiting) == expected_tokens(list(b"waiting"), 7, 0, 3)
    assert [(f.token, f.finish) for f in await stage.frames(doomed)] == [(None, "abort")]
    assert [(await stage.frames(half, choice))[-1].finish for choice in range(2)] == ["stop", "length"]
    await stage.at_rest()


def _early_stop() -> int:
    """A token that choice 0 of the prompt "half" meets early and choice 1 never."""
    never = set(expected_tokens(list(b"half"), 0, 1, LENGTH))
    return next(t for t in expected_tokens(list(b"half"), 0, 0, 20)[5:] if t not in never)


# ------------------------------------------------------------------ workers


async def test_a_dead_workers_sequences_move(stage: Stage, raw: redis.Redis) -> None:
    stage.scheduler(timing=HASTY)
    first = stage.worker(step_s=0.01)
    rids = await started(stage, PROMPTS)
    first.task.cancel()
    stage.worker(wid="worker-1", step_s=0.001)
    await undisturbed(stage, PROMPTS, rids)
    for rid in rids:
        record = await stage.bus.read_request(rid)
        assert record is not None
        assert record.attempts == 1
        assert record.placements[0] > 1
    assert [w.wid for w in await stage.bus.list_workers()] == ["worker-1"]
    await stage.until(told(stage, "workers_lost", 1))
    assert (await stage.bus.read_depth_fields())["taken_over"] == 0
    assert leaked_keys(raw) == []


async def test_a_hung_worker_is_retired_and_its_late_commits_are_refused(stage: Stage) -> None:
    stage.scheduler(timing=HASTY)
    first = stage.worker(step_s=0.01)
    rids = await started(stage, PROMPTS)
    first.running.clear()
    stage.worker(wid="worker-1", step_s=0.01)

    async def retired() -> bool:
        return [w.wid for w in await stage.bus.list_workers()] == ["worker-1"]

    await stage.until(retired)
    first.running.set()  # it wakes, finds itself fenced, and registers anew

    async def back() -> bool:
        return first.registrations == 2

    await stage.until(back)
    await undisturbed(stage, PROMPTS, rids)


async def test_a_worker_that_restarts_at_once_goes_on_under_a_new_gen(stage: Stage) -> None:
    """The scheduler may never see it missing: a new gen of a known worker is a death of the old one."""
    stage.scheduler()
    first = stage.worker(step_s=0.01)
    rids = await started(stage, PROMPTS)
    first.task.cancel()
    again = stage.worker(step_s=0.001)
    await undisturbed(stage, PROMPTS, rids)
    assert again.gen > first.gen
    for rid in rids:
        record = await stage.bus.read_request(rid)
        assert record is not None
        assert record.attempts == 1


async def test_a_draining_workers_sequences_move_and_it_is_let_go(stage: Stage) -> None:
    stage.scheduler()
    first = stage.worker(step_s=0.01)
    rids = await started(stage, PROMPTS)
    stage.worker(wid="worker-1", step_s=0.001)

    async def two() -> bool:
        return len(await stage.bus.list_workers()) == 2

    await stage.until(two)
    await first.drain()
    await asyncio.wait_for(first.task, PATIENCE_S)
    assert first.left
    await undisturbed(stage, PROMPTS, rids)
    for rid in rids:
        record = await stage.bus.read_request(rid)
        assert record is not None
        assert record.attempts == 0  # leaving in order is no death


async def test_a_worker_that_drains_alone_finishes_its_sequences(stage: Stage) -> None:
    stage.scheduler()
    first = stage.worker(step_s=0.005)
    rids = await started(stage, PROMPTS)
    await first.drain()
    await asyncio.wait_for(first.task, PATIENCE_S)
    await undisturbed(stage, PROMPTS, rids)


async def test_a_worker_that_drained_before_the_term_is_let_go(stage: Stage) -> None:
    worker = stage.worker(state="draining")
    stage.scheduler()
    await asyncio.wait_for(worker.task, PATIENCE_S)
    assert worker.left


async def test_a_worker_of_another_wire_version_gets_no_plans(
    stage: Stage, raw: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    strange = stage.worker(wid="strange")

    async def registered() -> bool:
        return bool(await stage.bus.list_workers())

    await stage.until(registered)
    raw.hset(stage.bus.keys.worker("strange"), "wire", WIRE + 1)
    stage.scheduler()
    rid = await stage.accept("x", max_tokens=3)

    async def refused() -> bool:
        return "wire version" in caplog.text

    await stage.until(refused)
    stage.worker()
    assert len(await stage.tokens(rid)) == 3
    assert strange.steps == 0
    assert caplog.text.count("wire version") == 1


class Mortal(ScriptedWorker):
    """Dies at every plan that brings the deadly prompt, before it has done anything."""

    async def _execute(self, plan: Plan, plan_id: str) -> None:
        for new in plan.new:
            if list(unpack_ids(new.token_ids))[:6] == list(b"deadly"):
                raise asyncio.CancelledError
        await super()._execute(plan, plan_id)


async def test_a_deadly_request_ends_alone_and_the_others_go_on(stage: Stage, raw: redis.Redis) -> None:
    stage.scheduler(timing=HASTY)

    async def immortal() -> None:
        """A supervisor: restarts the worker whenever it dies."""
        while True:
            worker = Mortal(stage.bus, step_s=0.005)
            with pytest.raises(asyncio.CancelledError):
                await worker.run()
            current = asyncio.current_task()
            assert current is not None
            if current.cancelling():
                raise asyncio.CancelledError

    task = asyncio.ensure_future(immortal())
    stage.watch(task)
    others = await started(stage, PROMPTS, frames=2)
    deadly = await stage.accept("deadly", max_tokens=LENGTH, job={"results": "r"})
    frames = await stage.frames(deadly)
    assert frames[-1].finish == "error"
    assert (frames[-1].extra or {})["code"] == "engine_failed"
    await undisturbed(stage, PROMPTS, others)
    ((_, letter),) = raw.xrange(stage.bus.keys.dead)
    assert letter[b"rid"].decode() == deadly
    assert b"deadly" not in b"".join(letter.values())
    ((_, result),) = await stage.bus.read_results("r")
    assert result.finish_reason == "error"
