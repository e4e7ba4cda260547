"""The shards of one model as a client of the queue sees them: each with its bus and a subscription, merged."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass

from protocol.bus import GatewayBus
from protocol.connection import Subscription
from protocol.errors import NotFound, ServiceError
from protocol.messages import Job, Row, shard_of
from protocol.routing.shards import Shard, ShardStore, choose, first_bytes, served

CHECK_S = 1.0  # a silent stream is compared with its journal this often
PATIENCE_S = 30.0  # how long a call waits for a server that does not answer
FOLLOW_S = 3.0  # how often it is looked whether the model has further shards


@dataclass
class Part:
    """One shard, and who listens to it."""

    shard: Shard
    bus: GatewayBus
    subscription: Subscription
    listener: asyncio.Task[None]


class Parts:
    """``deliver`` is called with the rows that come in ``channel`` of any shard; [] tells that some may be missing."""

    def __init__(self, url: str, model: str, channel: str, deliver: Callable[[list[Row]], None]) -> None:
        self._url, self._model, self._channel = url, model, channel
        self._deliver = deliver
        self._store = ShardStore(url, PATIENCE_S)
        self._parts: dict[int, Part] = {}  # by the number of the shard
        self._followed_at = 0.0
        self._following = asyncio.Lock()

    @property
    def first(self) -> Part:
        return self._parts[0]

    async def follow(self) -> None:
        """Subscribe in every shard that the model has by now. StartError, Unavailable."""
        async with self._following:
            await self._follow()

    async def _follow(self) -> None:
        for shard in served(await self._store.read(self._model)):
            if shard.number in self._parts:
                self._parts[shard.number].shard = shard
                continue
            bus = GatewayBus(self._url, shard.tag, patience=PATIENCE_S)
            try:
                await bus.connect()
                subscription = bus.subscribe(self._channel)
                await subscription.start()
            except BaseException:
                await bus.close()
                raise
            listener = asyncio.create_task(self._listen(subscription), name="headrace client")
            self._parts[shard.number] = Part(shard, bus, subscription, listener)
        self._followed_at = time.monotonic()

    async def close(self) -> None:
        for part in self._parts.values():
            part.listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await part.listener
            await part.subscription.close()
            await part.bus.close()
        await self._store.close()

    async def bus_of(self, rid: str) -> GatewayBus:
        """Of the shard in which this request lies. NotFound where the model has no such shard."""
        number = shard_of(rid)
        if number not in self._parts:
            await self.follow()
        if number not in self._parts:
            raise NotFound("no such request", param="id")
        return self._parts[number].bus

    async def choose(self, job: Job) -> Part:
        """The shard for a new request."""
        if time.monotonic() - self._followed_at > FOLLOW_S:
            await self.follow()
        if len(self._parts) == 1:
            return self.first
        parts = [part for part in self._parts.values() if part.shard.open]
        waiting = await asyncio.gather(*(part.bus.read_depth() for part in parts))
        loads = {part.shard.tag: float(requests) for part, (requests, _, _) in zip(parts, waiting, strict=True)}
        tag = choose(list(loads), str, loads.__getitem__, job.tenant, first_bytes(job))
        return next(part for part in parts if part.shard.tag == tag)

    async def _listen(self, publications: AsyncIterable[list[Row]]) -> None:
        """Deliver rows for ever. A subscription is restored however long the server is unreachable; readers learn of an
        outage from their own calls."""
        while True:
            try:
                async for rows in publications:
                    self._deliver(rows)
                return
            except ServiceError:
                await asyncio.sleep(CHECK_S)
