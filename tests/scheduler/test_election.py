"""Who leads, who is dead: counts of unchanged reads, and the compare-and-set on a real server."""

from __future__ import annotations

import asyncio

import pytest

from protocol.errors import Fenced
from scheduler.election import ServerClock, Timing, Watch, keep_lead, stand_by
from tests.bus import Bus

PROMISED = Timing()
QUICK = Timing(beat_s=0.01, apart_s=0.02, slow_s=60.0, reads=3)


def dead_at(reads: list[tuple[object, float, float]], timing: Timing = PROMISED) -> int | None:
    """Index of the read that finds the observed one dead; reads are (value, began, ended)."""
    watch = Watch(timing)
    for k, (value, began, ended) in enumerate(reads):
        if watch.seen(value, began, ended):
            return k
    return None


def test_six_unchanged_reads_a_second_apart_are_a_death() -> None:
    assert dead_at([((1, 7), t * 1.01, t * 1.01 + 0.001) for t in range(20)]) == 6


def test_a_change_restarts_the_count() -> None:
    reads: list[tuple[object, float, float]] = [((1, 7 if t < 6 else 8), t * 1.1, t * 1.1) for t in range(20)]
    assert dead_at(reads) == 12


def test_reads_close_together_count_once() -> None:
    assert dead_at([(1, t * 0.1, t * 0.1) for t in range(55)]) is None
    assert dead_at([(1, t * 0.1, t * 0.1) for t in range(100)]) == 60


def test_a_slow_read_restarts_the_count() -> None:
    reads: list[tuple[object, float, float]] = [(1, t * 1.1, t * 1.1) for t in range(6)]
    reads += [(1, 7.0, 22.0)]  # the server was stalled for 15 s
    reads += [(1, 22.0 + t * 1.1, 22.0 + t * 1.1) for t in range(1, 20)]
    assert dead_at(reads) == 12


def test_an_observer_that_was_frozen_does_not_count_its_own_absence() -> None:
    assert dead_at([(1, 0.0, 0.0), (1, 1000.0, 1000.0), (2, 1001.0, 1001.0)]) is None


def test_the_server_clock_maps_times() -> None:
    clock = ServerClock()
    clock.observe(1_000_000, 50.0, 50.1)
    assert clock.monotonic(1_002_000) == pytest.approx(52.05)
    clock.observe(2_000_000, 60.0, 70.0)  # a slow answer tells nothing
    assert clock.monotonic(1_002_000) == pytest.approx(52.05)


async def lead(bus: Bus, owner: str) -> int:
    return (await stand_by(bus, owner, QUICK, lambda: None)).epoch


async def test_an_empty_record_is_led_at_once_and_a_released_one_too(bus: Bus) -> None:
    assert await lead(bus, "a") == 1
    assert await bus.release(1, "a")
    assert await lead(bus, "b") == 2
    assert (await bus.read_leader()).owner == "b"


async def test_a_silent_leader_is_replaced_and_finds_itself_fenced(bus: Bus) -> None:
    assert await lead(bus, "a") == 1
    assert await lead(bus, "b") == 2
    with pytest.raises(Fenced, match="epoch"):
        await bus.renew_lead(1, "a")


async def test_only_a_lead_taken_from_a_silent_leader_is_a_takeover(bus: Bus) -> None:
    """So that the metric of takeovers stays 0 over clean starts and updates."""
    leads = [await stand_by(bus, "a", QUICK, lambda: None)]
    assert await bus.release(1, "a")
    leads += [await stand_by(bus, owner, QUICK, lambda: None) for owner in ("b", "c")]
    assert leads == [(1, False), (2, False), (3, True)]


async def test_a_beating_leader_stays_and_of_two_standbys_one_follows(bus: Bus) -> None:
    epoch = await lead(bus, "a")
    beats = asyncio.ensure_future(keep_lead(bus, epoch, "a", QUICK, ServerClock(), lambda: None))
    waiting = {asyncio.ensure_future(lead(bus, "b")), asyncio.ensure_future(lead(bus, "c"))}
    while (await bus.read_leader()).beat < 60:  # many times what a silent leader would have been given
        assert not any(task.done() for task in waiting)
        await asyncio.sleep(0.01)
    beats.cancel()
    done, waiting = await asyncio.wait(waiting, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result() for task in done] == [2]
    for task in waiting:
        task.cancel()


async def test_keeping_the_lead_ends_fenced_once_another_leads(bus: Bus) -> None:
    epoch = await lead(bus, "a")
    beats = asyncio.ensure_future(keep_lead(bus, epoch, "a", QUICK, ServerClock(), lambda: None))
    while await bus.lead("b", await bus.read_leader()) is None:  # noqa: ASYNC110 (a compare-and-set loop)
        await asyncio.sleep(0)
    with pytest.raises(Fenced):
        await asyncio.wait_for(beats, 60)
