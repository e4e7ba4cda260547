"""What the protocol's tests share."""

from __future__ import annotations

import pytest
import redis

from tests.bus import Bus
from tests.protocol.stage import Stage


@pytest.fixture
async def stage(bus: Bus, raw: redis.Redis) -> Stage:
    """Led and with one worker."""
    stage = Stage(bus, raw)
    await stage.lead()
    await stage.register()
    return stage
