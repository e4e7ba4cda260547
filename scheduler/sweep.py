"""What lies in the home slot for a model is kept true: claims of idempotency keys and reservations of tenants that no
request stands behind are freed, and what the model's slot owes is settled (protocol/bus/home.py)."""

from __future__ import annotations

import asyncio
import logging

from protocol.bus import HomeBus, LeaderBus
from protocol.errors import ServiceError

log = logging.getLogger("headrace.scheduler")

PAUSE_S = 15.0
SETTLE_S = 0.25
AT_ONCE = 256  # claims or reservations in one look


async def sweep(home: HomeBus, bus: LeaderBus, model: str) -> int:
    """Look once at the claims and reservations that are due. Returns how many were freed."""
    freed = 0
    for claim in await home.due(model, AT_ONCE):
        if claim.rid == "-" or await bus.void(claim.rid):  # "-": its value is gone
            await home.free(claim)
            freed += 1
        else:
            await home.look_later(claim)
    for hold in await home.due_holds(model, AT_ONCE):
        if await bus.void(hold.rid):
            await home.give_back(hold.tenant, hold.rid)
            freed += 1
        elif await bus.ended([hold.rid]):
            await home.give_back(hold.tenant, hold.rid, ended=True)
            freed += 1
        else:
            await home.look_at_later(hold)
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
