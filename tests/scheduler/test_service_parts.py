"""The service's pure parts: journals read back, terminal rows, the measured rate, signs of life."""

from __future__ import annotations

import asyncio

import pytest
import redis

from protocol.errors import Fenced, StartError
from protocol.messages import Frame, Job, Plan, Terminal, decode_frames, encode, pack_ids
from protocol.records import RequestRecord
from protocol.sampling import SamplingParams
from scheduler.election import ServerClock
from scheduler.leader import TokenRate
from scheduler.metrics import Exposed, Health, Metrics, serve_status
from scheduler.recovery import arrive, choice_state, read_state, terminal_row
from tests.bus import Bus
from tests.scheduler.conftest import PATIENCE_S, Stage

JOURNAL = b"".join(
    [
        encode(Frame(65, "A", None, {"cached": 3})),
        encode(Frame(0xC3, "", None, {"held": "\ufffd"})),
    ]
)


def record(**fields: object) -> RequestRecord:
    job = Job(prompt=["ab", "c"], sampling=SamplingParams(n=2, max_tokens=9), results="r", id="mine", priority="batch")
    values: dict[str, object] = {
        "rid": "x", "job": job, "tenant": "t", "seed": 5, "prompts": [pack_ids([1, 2]), pack_ids([3])],
        "created_ms": 1000, "deadline_ms": 4000, "attempts": 1, "cancel": None, "open": 4, "attached": 0,
        "placements": [0, 0, 7, 0], "ends": [None] * 4,
    }  # fmt: skip
    return RequestRecord(**{**values, **fields})  # type: ignore[arg-type]


def test_a_journal_tells_where_its_choice_stands() -> None:
    state = choice_state(JOURNAL, 4, None)
    assert (list(state.output), state.cursor, state.placement, state.finish) == ([65, 0xC3], len(JOURNAL), 4, None)
    assert choice_state(b"", 0, None).cursor == 0
    ended = choice_state(JOURNAL + encode(Frame(None, "", "abort")), 4, None)
    assert (list(ended.output), ended.finish) == ([65, 0xC3], "abort")


def test_a_terminal_row_emits_held_text_first_and_counts_what_the_journal_holds() -> None:
    row = terminal_row(record(), 2, JOURNAL, "deadline")
    assert (row.choice, row.placement, row.cursor, row.finish, row.id) == (2, 7, len(JOURNAL), "deadline", "mine")
    (frame,) = decode_frames(row.frames)
    assert (frame.token, frame.text, frame.finish, frame.extra) == (None, "\ufffd", "deadline", None)
    assert row.result is not None
    import msgspec

    result = msgspec.msgpack.decode(row.result, type=Terminal)
    assert (result.text, result.completion_tokens, result.prompt_tokens, result.cached_tokens) == ("A\ufffd", 2, 1, 3)


def test_an_error_row_carries_code_message_and_param_in_frame_and_result() -> None:
    error = {"code": "too_large", "message": "m", "param": None}
    row = terminal_row(record(), 0, b"", "error", error)
    assert decode_frames(row.frames)[0].extra == error


def test_an_arrival_from_a_record() -> None:
    clock = ServerClock()
    clock.observe(2000, 100.0, 100.0)
    event = arrive(record(), clock)
    assert (event.arrived, event.deadline) == (99.0, 102.0)
    assert [list(p) for p in event.prompts] == [[1, 2], [3]]
    assert (event.tenant, event.priority, event.seed, event.id, event.wants_result) == ("t", "batch", 5, "mine", True)
    assert event.attempts == 1
    assert arrive(record(deadline_ms=0), clock).deadline is None


async def test_a_choice_that_is_gone_or_foreign_has_ended(bus: Bus, raw: object) -> None:
    assert (await read_state(bus, "nobody", 0)).finish == "abort"
    raw.set(bus.keys.request("odd"), "not a hash")  # type: ignore[attr-defined]
    assert (await read_state(bus, "odd", 0)).finish == "error"


def test_the_rate_is_smoothed_and_an_idle_system_keeps_its_last() -> None:
    rate = TokenRate()
    rate.note(0.0, 0, idle=False)
    rate.note(1.0, 100, idle=False)
    assert rate.value == pytest.approx(100)
    rate.note(2.0, 300, idle=False)
    assert 100 < rate.value < 200
    kept = rate.value
    rate.note(50.0, 300, idle=True)
    assert rate.value == kept


def test_silence_of_a_part_is_told_by_its_name() -> None:
    health = Health(limit_s=-1.0)
    health.alive("planner")
    assert health.silent() == ["planner"]
    patient = Health(limit_s=3600.0)
    patient.alive("planner")
    assert patient.silent() == []


async def test_health_is_503_while_a_part_is_silent(unused_tcp_port: int) -> None:
    import aiohttp

    health = Health(limit_s=-1.0)
    health.alive("planner")
    runner = await serve_status(Exposed(Metrics("m")), health, "127.0.0.1", unused_tcp_port)
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://127.0.0.1:{unused_tcp_port}/health") as reply,
        ):
            assert reply.status == 503
            assert (await reply.json())["silent"] == ["planner"]
        with pytest.raises(StartError, match="--metrics-port"):
            await serve_status(Exposed(Metrics("m")), health, "127.0.0.1", unused_tcp_port)
    finally:
        await runner.cleanup()


async def test_a_standby_ends_in_order_without_having_led(stage: Stage) -> None:
    leader, _ = stage.scheduler()

    async def leads() -> bool:
        return bool((await stage.bus.read_leader()).owner)

    await stage.until(leads)
    standby, stop = stage.scheduler()
    stop.set()
    assert await asyncio.wait_for(standby, PATIENCE_S) == 0
    assert (await stage.bus.read_leader()).epoch == 1
    assert not leader.done()


async def test_several_plans_travel_in_one_call_in_order_even_to_a_server_that_forgot_the_script(
    bus: Bus, raw: redis.Redis
) -> None:
    epoch = await bus.lead("s", await bus.read_leader())
    assert epoch is not None
    gen = await bus.register("w", None, "serving")
    raw.script_flush()
    await bus.plan(epoch, "w", gen, *(Plan(epoch, gen, step) for step in range(1, 8)))
    await bus.plan(epoch, "w", gen, *(Plan(epoch, gen, step) for step in range(5, 10)))  # 5 to 7 are repeats
    assert [plan.step for _, plan in await bus.read_plans("w", "0-0", 10)] == list(range(1, 10))
    with pytest.raises(Fenced, match="gen"):
        await bus.plan(epoch, "w", gen + 1, Plan(epoch, gen + 1, 1), Plan(epoch, gen + 1, 2))


async def test_a_stop_is_heard_while_the_server_is_away(stage: Stage) -> None:
    scheduler, stop = stage.scheduler(redis_url="redis://127.0.0.1:9/0")
    await asyncio.sleep(0.1)
    assert not scheduler.done()
    stop.set()
    assert await asyncio.wait_for(scheduler, PATIENCE_S) == 0
