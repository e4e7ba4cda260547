"""The shards of the model under fire, seen as one: where a request lies is told by its rid."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from protocol.messages import Terminal, shard_of
from protocol.records import RequestRecord
from protocol.routing.shards import ShardStore
from tests.bus import Bus


class Shards:
    """``buses`` by number."""

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self.buses = [Bus(url, model)]

    async def connect(self) -> None:
        store = ShardStore(self._url)
        tags = [shard.tag for shard in await store.read(self.buses[0].keys.model)]
        await store.close()
        self.buses += [Bus(self._url, tag) for tag in tags[1:]]
        for bus in self.buses:
            await bus.connect()

    async def close(self) -> None:
        for bus in self.buses:
            await bus.close()

    async def read_request(self, rid: str) -> RequestRecord | None:
        return await self.buses[shard_of(rid)].read_request(rid)

    async def read_journal(self, rid: str, choice: int) -> bytes:
        return await self.buses[shard_of(rid)].read_journal(rid, choice)

    async def journal_lengths(self, rid: str, choices: int) -> list[int]:
        """Bytes of each."""
        return await self.buses[shard_of(rid)].journal_lengths([(rid, choice) for choice in range(choices)])

    async def push(self, payload: bytes, rng: random.Random) -> None:
        await rng.choice(self.buses).push(payload)

    async def read_results(self, name: str, saw: Callable[[Terminal], None]) -> None:
        """Those of every shard, for ever."""

        async def read(bus: Bus) -> None:
            after = "0-0"
            while True:
                for entry_id, terminal in await bus.read_results(name, after, block_ms=500):
                    after = entry_id
                    saw(terminal)

        await asyncio.gather(*map(read, self.buses))

    async def each(self, ask: Callable[[Bus], Awaitable[list[str]]]) -> list[str]:
        return [found for bus in self.buses for found in await ask(bus)]
