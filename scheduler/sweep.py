"""What a leader takes to other slots. To the home slot (protocol/bus/home.py): what its own slot owes is settled there,
and claims of idempotency keys and reservations of tenants that no request stands behind are freed. To the first shard
of its model: pushes that came to a shard that drains."""

from __future__ import annotations

import asyncio
import logging

from protocol.bus import HomeBus, LeaderBus
from protocol.errors import ServiceError

log = logging.getLogger("headrace.scheduler")

PAUSE_S = 15.0
SETTLE_S = 0.25
MOVE_S = 1.0
AT_ONCE = 256  # claims or reservations in one batch
MOST_BATCHES = 100  # of one look


async def sweep(home: HomeBus, bus: LeaderBus, model: str) -> int:
    """Look at the claims and reservations that are due. Returns how many were freed.

    In batches of a few round trips, until few are left: a model may take hundreds of keys a second. A claim is looked
    at once a minute while its request runs; once it has ended, the claim expires with it."""
    freed = 0
    for _ in range(MOST_BATCHES):
        claims = await home.due(model, AT_ONCE)
        gone = await bus.void_each([claim.rid for claim in claims])  # also where the value of a claim is gone: "-"
        await home.free_or_put_off(list(zip(claims, gone, strict=True)))
        freed += gone.count(None)
        if len(claims) < AT_ONCE:
            break
    for _ in range(MOST_BATCHES):
        holds = await home.due_holds(model, AT_ONCE)
        gone = await bus.void_each([hold.rid for hold in holds])
        await home.end_or_put_off(list(zip(holds, gone, strict=True)))
        freed += len(gone) - gone.count(0)
        if len(holds) < AT_ONCE:
            break
    return freed


async def settle(home: HomeBus, bus: LeaderBus, model: str, epoch: int, settled: int = 0) -> int:
    """Take to the home slot what the model's slot owes. Returns the number of the last batch that it has."""
    number, owed = await bus.collect(epoch, settled)
    if owed:
        await home.settle(model, number, owed)
    return number or settled


async def sweep_often(home: HomeBus, bus: LeaderBus, model: str, epoch: int) -> None:
    """Until cancelled. A home that does not answer, or whose keys are not ours, stops nothing else."""
    settled, looks = 0, 0
    while True:
        try:
            settled = await settle(home, bus, model, epoch, settled)
            if looks % (PAUSE_S / SETTLE_S) == 0:
                await sweep(home, bus, model)
        except ServiceError as error:
            log.warning("claims and reservations could not be looked at: %s", error)
        looks += 1
        await asyncio.sleep(SETTLE_S)


async def move(bus: LeaderBus, first: LeaderBus) -> int:
    """Take what was diverted here to the first shard, in its order. Returns how much it was."""
    found = await bus.read_moving(AT_ONCE)
    for entry_id, origin, payload in found:
        await first.receive(bus.keys.shard, entry_id, origin, payload)
        await bus.moved(entry_id)
    return len(found)


async def move_often(bus: LeaderBus, first: LeaderBus) -> None:
    """Until cancelled. Where the first shard does not answer, or its memory is full, pushes wait here."""
    while True:
        try:
            await move(bus, first)
        except ServiceError as error:
            log.warning("pushes of a shard that drains could not be moved: %s", error)
        await asyncio.sleep(MOVE_S)
