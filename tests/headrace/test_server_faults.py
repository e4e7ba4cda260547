"""A server that stalls or is killed under a running stack: everything goes on where it was, and nobody is deposed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import aiohttp
import pytest

from headrace.serve.embedded import server_url
from scheduler.election import Timing, stand_by
from tests.bus import Bus
from tests.headrace.readers import Reader, attempt
from tests.stack import Stack
from tests.waits import eventually

FROZEN_S = 15.0  # more than twice what makes a leader or a worker count as dead
TOKENS = 1200
SEEDS = (1, 2)


@pytest.fixture
async def bus(stack: Stack) -> AsyncIterator[Bus]:
    """A client of the stack's own server, which it waits for as the services do."""
    bus = Bus(server_url(stack.run_dir / "data"), "org/tiny")
    await bus.connect()
    yield bus
    await bus.close()


async def terms(bus: Bus) -> tuple[int, str, list[tuple[str, int]]]:
    """The epoch and its leader, and every worker with its generation."""
    leader = await bus.read_leader()
    return leader.epoch, leader.owner, [(worker.wid, worker.gen) for worker in await bus.list_workers()]


async def test_a_stalled_server_deposes_nobody(stack: Stack, bus: Bus) -> None:
    looks = []
    async with aiohttp.ClientSession() as session:
        undisturbed = [await Reader(session, stack.url, 100, seed).whole() for seed in SEEDS]
        before, pids = await terms(bus), stack.processes()
        standby = asyncio.create_task(stand_by(bus, "standby", Timing(), lambda: looks.append(1)))
        await eventually(lambda: len(looks) > 1, "a standby that watches")
        running = [Reader(session, stack.url, TOKENS, seed) for seed in SEEDS]
        for reader in running:
            await reader.more()

        ((_, server),) = stack.pids("redis").items()
        os.kill(server, signal.SIGSTOP)
        await asyncio.sleep(FROZEN_S)
        watched = len(looks)
        os.kill(server, signal.SIGCONT)

        for reader, start in zip(running, undisturbed, strict=True):
            assert (await reader.whole()).startswith(start)
        await eventually(lambda: len(looks) > watched + 2, "a standby that still watches")
        assert not standby.done()
        assert await terms(bus) == before
        assert stack.processes() == pids
        standby.cancel()
        await asyncio.gather(standby, return_exceptions=True)


async def test_a_server_that_is_killed_again_and_again(stack: Stack, bus: Bus) -> None:
    """Each time it has forgotten scripts and subscriptions, and no write that it acknowledged."""
    async with aiohttp.ClientSession() as session:
        undisturbed = [await Reader(session, stack.url, 100, seed).whole() for seed in SEEDS]
        before = await terms(bus)
        others = {p["name"]: p["pid"] for p in stack.processes() if p["role"] != "redis"}
        running = [Reader(session, stack.url, TOKENS, seed) for seed in SEEDS]
        for _ in range(3):
            for reader in running:
                await reader.more()
            old = stack.kill("redis")
            await eventually(lambda old=old: stack.pids("redis").get("redis", old) != old, "another server")
        for reader, start in zip(running, undisturbed, strict=True):
            assert (await reader.whole()).startswith(start)
        assert await terms(bus) == before
        assert {p["name"]: p["pid"] for p in stack.processes() if p["role"] != "redis"} == others

        async def answered() -> bool:
            return (await attempt(session, stack.url))[0] == 200

        await eventually(answered, "an answer")
