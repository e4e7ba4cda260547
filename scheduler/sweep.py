"""The sweep: claims of idempotency keys that no request stands behind are freed (protocol/bus/home.py)."""

from __future__ import annotations

import asyncio
import logging

from protocol.bus import HomeBus, LeaderBus
from protocol.errors import ServiceError

log = logging.getLogger("headrace.scheduler")

PAUSE_S = 15.0
AT_ONCE = 256  # claims in one look


async def sweep(home: HomeBus, bus: LeaderBus, model: str) -> int:
    """Look once at the claims that are due. Returns how many were freed."""
    freed = 0
    for claim in await home.due(model, AT_ONCE):
        if claim.rid == "-" or await bus.void(claim.rid):  # "-": its value is gone
            await home.free(claim)
            freed += 1
        else:
            await home.look_later(claim)
    return freed


async def sweep_often(home: HomeBus, bus: LeaderBus, model: str) -> None:
    """Until cancelled. A home that does not answer, or whose keys are not ours, stops nothing else."""
    while True:
        try:
            await sweep(home, bus, model)
        except ServiceError as error:
            log.warning("claims of idempotency keys could not be swept: %s", error)
        await asyncio.sleep(PAUSE_S)
