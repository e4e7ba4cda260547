"""How long a model that has accepted a request may say nothing before another candidate is asked."""

from __future__ import annotations

import asyncio
import contextlib
import time

from gateway.models import Model, Models
from gateway.streams import Follower
from protocol.bus import GatewayBus

LOOK_S = 0.5  # how often it is looked at whether the model is still up


async def said_in_time(follower: Follower, bus: GatewayBus, model: Model, models: Models, until: float) -> bool:
    """Whether the first token (or the end) came before ``until`` (monotonic seconds), and before the model was down."""
    follower.awaited = True
    while not follower.begun_to_speak:
        left = until - time.monotonic()
        if left <= 0 or not models.up(model):
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(LOOK_S, left)):
                await follower.news.wait()
        follower.news.clear()
        if follower.behind:
            await follower.catch_up(bus)
    follower.awaited = False
    follower.news.set()  # the next step has to check the state first
    return True
