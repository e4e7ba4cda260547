"""One shard of a model as a gateway sees it: its bus, the readers of its streams, and whether it is served."""

from __future__ import annotations

import asyncio
import math
import time

from gateway.streams import Outlet
from protocol.bus import GatewayBus
from protocol.errors import HeadraceError, StartError, Unavailable
from protocol.routing.shards import Shard

STILL_S = 6.0  # a leader whose beat has not changed for so long counts as dead
PATIENCE_S = 3.0  # how long a request waits for Redis to come back
ACCEPTS_AT_ONCE = 64  # each takes a connection


class Slot:
    """Most models have only one."""

    def __init__(self, url: str, shard: Shard, name: str) -> None:
        self.shard = shard
        self.bus = GatewayBus(url, shard.tag, patience=PATIENCE_S)
        self.outlet = Outlet(self.bus, name)
        self.accepting = asyncio.Semaphore(ACCEPTS_AT_ONCE)
        self.workers = 0  # serving now
        self.waiting_requests, self.waiting_tokens, self.rate = 0, 0, 0.0  # as the leader told it last
        self.sent = 0  # requests since then
        self._beat: tuple[int, int] | None = None
        self._first_beats: dict[str, tuple[int, int]] = {}  # of each worker, when it was first seen: (gen, beat)
        self._moved: float | None = None  # when the leader's beat was last seen to change

    async def open(self) -> None:
        """Connect and subscribe. Unavailable if the server cannot be used now."""
        try:
            await self.bus.connect()
        except StartError as error:
            raise Unavailable(str(error)) from None
        await self.outlet.start()

    async def close(self) -> None:
        await self.outlet.close()
        await self.bus.close()

    @property
    def led(self) -> bool:
        return self._moved is not None and time.monotonic() - self._moved < STILL_S

    @property
    def ready(self) -> bool:
        return self.workers > 0 and self.led

    @property
    def load(self) -> float:
        """Waiting requests for each worker; endless where nobody serves."""
        return (self.waiting_requests + self.sent) / self.workers if self.ready else math.inf

    async def look(self, depth: bool) -> None:
        """Read which workers serve and whether the leader's beat changes; with ``depth`` also what waits."""
        try:
            leader = await self.bus.read_leader()
            workers = await self.bus.list_workers()
            if depth:
                self.waiting_requests, self.waiting_tokens, self.rate = await self.bus.read_depth()
                self.sent = 0
        except HeadraceError:
            self.workers = 0
            return
        before = self._first_beats
        self._first_beats = {w.wid: before.get(w.wid, (w.gen, w.beat)) for w in workers}
        self.workers = sum(w.state == "serving" and self._first_beats[w.wid] != (w.gen, w.beat) for w in workers)
        beat = (leader.epoch, leader.beat)
        if self._beat is not None and beat != self._beat:
            self._moved = time.monotonic()
        self._beat = beat
