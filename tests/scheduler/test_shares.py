"""Leaders of a model's shards tell each other, in the home slot, whom they have served."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import redis

from protocol.bus import HomeBus
from scheduler.core.events import Event, ServedElsewhere
from scheduler.core.scheduler import Core
from scheduler.shares import AHEAD_S, Shares


class Leader:
    """A core whose tenants are served by hand."""

    def __init__(self, home: HomeBus) -> None:
        self.core, self.several = Core(), True
        self.shares = Shares(home, "m", self.core, lambda: self.several)

    def serve(self, **tokens: float) -> None:
        for tenant, count in tokens.items():
            if tenant not in self.core.active_tenants():
                self.core._queue.enter(tenant)
            self.core._queue.charge(tenant, count)

    async def told(self) -> list[Event]:
        events: list[Event] = []
        await self.shares.exchange(events.append)
        return events


@pytest.fixture
async def leaders(redis_url: str, raw: redis.Redis) -> AsyncIterator[list[Leader]]:
    home = HomeBus(redis_url, patience=5.0)
    yield [Leader(home) for _ in range(2)]
    await home.close()


async def test_each_learns_what_the_others_have_served_and_not_its_own(leaders: list[Leader]) -> None:
    one, two = leaders
    one.serve(a=100, b=50)
    two.serve(a=10)
    assert await one.told() == []  # from here on
    assert await two.told() == []
    one.serve(a=30)
    assert await one.told() == [ServedElsewhere({"a": 10.0}, AHEAD_S * 30)]
    two.serve(a=5)
    assert await two.told() == [ServedElsewhere({"a": 30.0}, AHEAD_S * 5)]
    assert await two.told() == []


async def test_a_model_of_one_shard_tells_nobody(leaders: list[Leader], raw: redis.Redis) -> None:
    one, _ = leaders
    one.several = False
    one.serve(a=100)
    assert await one.told() == []
    assert raw.keys() == []
    assert one.core.take_charged() == {}
