"""Those who ask and those who read: gateways' clients, bare producers, a lossy reader, and who fills the memory."""

from __future__ import annotations

import collections
import random
from typing import Any

from protocol import messages
from protocol.connection import OutOfMemory
from protocol.errors import NotFound, Overloaded
from protocol.messages import Job
from protocol.sampling import SamplingParams
from tests.bus import Bus
from tests.protocol.model.link import Crash, Turn
from tests.protocol.model.world import ELSEWHERE, World

GROUPS = 4  # answers that several requests ask for


def draw_job(rng: random.Random, **fields: Any) -> Job:
    """A third of them ask for one of a few answers: these join each other, with results or without."""
    if rng.random() < 0.35:
        group = rng.randrange(GROUPS)
        sampling = SamplingParams(max_tokens=60, n=1 + group % 2, temperature=0.0)
        results = rng.choice([None, "res"])
        return Job(prompt="x", sampling=sampling, results=results, reply_to="gw", cache_salt=f"g{group}", **fields)
    sampling = SamplingParams(max_tokens=rng.randrange(1, 25), n=rng.choice([1, 1, 1, 2]))
    return Job(prompt="x", sampling=sampling, results="res", reply_to="gw", **fields)


async def client(world: World, number: int, requests: int) -> None:
    """A gateway's side: accepts under an idempotency key until it is told a rid, then perhaps attaches or cancels."""
    rng = world.rng
    for index in range(requests):
        key, job = f"k{number}-{index}", draw_job(rng)
        while True:
            rid = f"{rng.getrandbits(128):032x}"
            bus = world.bus()
            try:
                accepted = await bus.accept(job, rid=rid, idempotency=key)
                world.accepted[accepted.rid] = job
                world.agents.append(perhaps_cancel(world, accepted.rid))
                world.agents.append(perhaps_move(world, accepted.rid))
                break
            except Crash:
                world.stats["client died"] += 1
            except (OutOfMemory, Overloaded):
                world.stats["refused: out of memory"] += 1
            for _ in range(rng.randrange(40)):
                await Turn()


async def perhaps_cancel(world: World, rid: str) -> None:
    """What else its client may do to a request. A client that dies here has done its worst."""
    for _ in range(world.rng.randrange(1500)):
        await Turn()
    try:
        await meddle(world, world.bus(), rid)
    except Crash:
        world.stats["client died"] += 1


async def perhaps_move(world: World, rid: str) -> None:
    """A gateway that gives a request to another model if it says nothing for a while; it may die at any point."""
    for _ in range(world.rng.randrange(1500)):
        await Turn()
    if world.rng.random() < 0.5:
        return
    bus, there = world.bus(), f"{world.rng.getrandbits(128):032x}"
    try:
        await world.bus(ELSEWHERE).accept(world.accepted[rid], rid=there)
        moved = await bus.move(rid, "default", ELSEWHERE, there)
        world.stats["moved" if moved else "stayed"] += 1
        world.moves.append((rid, there, moved))
        if not moved:
            await world.bus(ELSEWHERE).cancel(there, "default")
    except (Crash, OutOfMemory, Overloaded):
        world.stats["client died"] += 1


async def meddle(world: World, bus: Bus, rid: str) -> None:
    choice = world.rng.random()
    if choice < 0.25:
        await bus.cancel(rid, "default")
        world.stats["cancels"] += 1
    elif choice < 0.4:  # a disconnect after somebody else attached is void
        before = await bus.read_request(rid)
        if before is not None and await bus.attach(rid, "default", "gw2"):
            if await bus.cancel(rid, "default", attached=before.attached):
                world.wrong["a void cancel counted"] += 1
            world.stats["attaches"] += 1
    if world.rng.random() < 0.2:
        try:
            await bus.cancel(rid, "somebody")
            world.wrong["another tenant's cancel"] += 1
        except NotFound:
            pass


async def producer(world: World, number: int, requests: int) -> None:
    """Pushes with an id, again and again if it does not know what became of it; now and then garbage."""
    rng = world.rng
    for index in range(requests):
        producer_id = f"p{number}-{index}"
        job = draw_job(rng, id=producer_id)
        while True:
            bus = world.bus()
            try:
                await bus.push(messages.encode(job))
                world.pushed[producer_id] = job
                if rng.random() < 0.2:
                    await bus.push(rng.choice([b"garbage", b"\x80", messages.encode(job)]))
                break
            except Crash:
                world.stats["producer died"] += 1
            except OutOfMemory:
                world.stats["refused: out of memory"] += 1
            for _ in range(rng.randrange(40)):
                await Turn()


async def reader(world: World) -> None:
    """Reads the live tail, of which a fifth is lost, and the journal where a cursor does not fit."""
    luck = random.Random(0)  # its own: when a publication arrives is the one thing here that no seed decides
    pubsub = world.plain.pubsub()
    keys = world.bus().keys
    pubsub.subscribe(keys.out("gw"))
    cursors: collections.Counter[tuple[str, int]] = collections.Counter()
    try:
        while True:
            message = pubsub.get_message(timeout=0)
            await Turn()
            if message is None or message["type"] != "message" or luck.random() < 0.2:
                continue
            for row in messages.decode_rows(message["data"]):
                if row.choice < 0:
                    continue
                at = (row.rid, row.choice)
                world.seen.append((row.rid, row.choice, row.cursor, row.frames))
                if row.cursor == cursors[at]:
                    cursors[at] += len(row.frames)
                elif row.cursor > cursors[at]:
                    world.stats["resyncs"] += 1
                    raw = world.plain.getrange(keys.journal(*at), cursors[at], -1)
                    world.seen.append((row.rid, row.choice, cursors[at], raw))
                    cursors[at] += len(raw)
    finally:
        pubsub.close()


async def operator(world: World) -> None:
    """Fills the memory now and then."""
    while True:
        for _ in range(world.rng.randrange(500, 4000)):
            await Turn()
        if world.faults:
            world.stats["out of memory"] += 1
            world.plain.config_set("maxmemory", 1)
            for _ in range(world.rng.randrange(50, 400)):
                await Turn()
            world.plain.config_set("maxmemory", 0)
