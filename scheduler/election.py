"""Who leads, and which process is dead: judged by counters that no longer change, not by wall clocks or key expiry.

A leader or a worker changes a counter (its beat) as it makes progress. An observer that has read the same value
six times, at least a second apart by its own monotonic clock, takes the observed process for dead. A read that itself
took longer than a second shows that the server was stalled, so nobody could change the counter: the count restarts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from protocol.bus import LeaderBus

log = logging.getLogger("headrace.scheduler")


@dataclass(frozen=True)
class Timing:
    """Seconds, and a count of reads. The defaults are the promised ones; tests shorten them."""

    beat_s: float = 0.5  # a leader's beat
    apart_s: float = 1.0  # least time between two reads that count
    slow_s: float = 1.0  # a read slower than this restarts the count
    reads: int = 6  # unchanged reads after which a process counts as dead

    @property
    def pause_s(self) -> float:
        """Between reads: a little more than what must lie between them, since timers may fire a little early."""
        return self.apart_s * 1.01


class Watch:
    """Counts how often one counter was read unchanged. Pure: the caller brings the times (monotonic seconds)."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._value: object = None
        self._counted = float("-inf")
        self.unchanged = 0

    def seen(self, value: object, started: float, ended: float) -> bool:
        """Note a read of ``value`` that began and ended at these times. True: it was unchanged for too long."""
        if value != self._value or ended - started > self._timing.slow_s:
            self._value, self._counted, self.unchanged = value, started, 0
        elif started - self._counted >= self._timing.apart_s:
            self._counted = started
            self.unchanged += 1
        return self.unchanged >= self._timing.reads


class ServerClock:
    """Maps server milliseconds (deadlines, creation times) to this process's monotonic seconds."""

    def __init__(self) -> None:
        self._offset = 0.0  # monotonic minus server, in seconds
        self._known = False

    def observe(self, server_ms: int, sent: float, received: float) -> None:
        """A server time obtained by a call that ran from ``sent`` to ``received``. Slow calls are ignored."""
        if received - sent < 0.25 or not self._known:
            self._offset = (sent + received) / 2 - server_ms / 1000
            self._known = True

    def monotonic(self, server_ms: int) -> float:
        return server_ms / 1000 + self._offset

    def now_ms(self) -> int:
        """The server's time, estimated."""
        return int((time.monotonic() - self._offset) * 1000)


class Lead(NamedTuple):
    epoch: int
    taken_over: bool  # from a leader that had gone silent; False: nobody led, or the lead was handed over


async def stand_by(bus: LeaderBus, owner: str, timing: Timing, looked: Callable[[], None]) -> Lead:
    """Wait until this process leads; returns the new lead. ``looked`` is called at every read.

    A lead that nobody ever had, or that was released, is taken at once.
    """
    watch = Watch(timing)
    while True:
        started = time.monotonic()
        seen = await bus.read_leader()
        ended = time.monotonic()
        looked()
        if not seen.owner or watch.seen((seen.epoch, seen.beat), started, ended):
            epoch = await bus.lead(owner, seen)
            if epoch is not None:
                return Lead(epoch, taken_over=bool(seen.owner))
            log.info("another scheduler took the lead first")
            watch = Watch(timing)
        await asyncio.sleep(timing.pause_s)


async def keep_lead(
    bus: LeaderBus, epoch: int, owner: str, timing: Timing, clock: ServerClock, looked: Callable[[], None]
) -> None:
    """Renew the lead until cancelled. Raises Fenced("epoch") once another scheduler leads."""
    while True:
        sent = time.monotonic()
        clock.observe(await bus.renew_lead(epoch, owner), sent, time.monotonic())
        looked()
        await asyncio.sleep(timing.beat_s)
