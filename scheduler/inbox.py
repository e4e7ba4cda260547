"""The loops over the inbox of one term: entries are read ahead as tickets, and seen through in the order of admission.

Reading ahead is what makes a fair order possible, since a stream is first in, first out. A ticket is some hundred
bytes: of an accepted request its tenant and length are asked for, not its body, and the payload of a push is dropped
unless it is small, to be read again when its turn comes.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Container, Mapping

from protocol.bus import LeaderBus
from protocol.messages import DEFAULT_TENANT
from protocol.records import InboxEntry
from scheduler.admission import Admission, FairQueue, Ticket
from scheduler.election import ServerClock
from scheduler.intake import Intake, address, entry_ms
from scheduler.prompts.tokenizer_pool import LONG_BOUNDS, SHORT
from scheduler.recovery import READS_AT_ONCE

log = logging.getLogger("headrace.scheduler")

BLOCK_MS = 5000  # blocking reads: long enough to cost nothing, short enough to notice a closed server
CLAIM_S = 1.0  # how often entries are looked for that a deposed leader read after our own start
FIRST_READ, LARGEST_READ = 4, 64  # entries in one read
READ_BYTES = 4 << 20  # wanted of one read
READ_AHEAD = 65_536  # tickets that wait
KEPT_BYTES = 16 << 20  # payloads of all tickets that wait
STRAY_S = (
    30.0  # how often accepted requests are looked for whose entries somebody has deleted; they are older than that
)
TENANT_BYTES = 2 << 20  # of one tenant's long texts in preparation


class Inbox:
    """``taking``: sees one entry through. One of these per term."""

    def __init__(
        self, bus: LeaderBus, epoch: int, intake: Intake, clock: ServerClock, weights: Mapping[str, float],
        admitted: Container[str] = (),
    ) -> None:  # fmt: skip
        """``admitted``: rids of requests that are known to need no entry."""
        self._bus = bus
        self._epoch = epoch
        self._consumer = f"epoch-{epoch}"  # of the stream's group: this term alone
        self._admitted = admitted
        self._intake = intake
        self._clock = clock
        short = FairQueue(READS_AT_ONCE, READS_AT_ONCE * SHORT, weights)
        # one more than there are processes, so that it has been read when its turn comes
        long = FairQueue(LONG_BOUNDS.processes + 1, TENANT_BYTES, weights)
        self._admission = Admission(short, long, SHORT, READS_AT_ONCE)
        self._held: set[str] = set()  # entries that wait or are seen through
        self._rids: set[str] = set()  # accepted requests behind these
        self._weighed: dict[str, bool] = {}  # rid of a request that is just being read -> cancelled meanwhile
        self._kept = 0  # bytes of payloads
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read())
            group.create_task(self._claim())
            group.create_task(self._put_back())
            while True:
                self._changed.clear()
                self._admission.late(self._clock.now_ms())
                while (ticket := self._admission.next(time.monotonic())) is not None:
                    group.create_task(self._see_through(ticket))
                if len(self._admission) < READ_AHEAD:
                    self._room.set()
                try:
                    async with asyncio.timeout(CLAIM_S):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    def cancelled(self, rid: str) -> None:
        """Request ``rid`` is to end: at once, if it waits here."""
        if rid in self._weighed:
            self._weighed[rid] = True
        if self._admission.cancelled(rid):
            self._changed.set()

    async def _read(self) -> None:
        count = FIRST_READ
        while True:
            await self._room.wait()
            entries = await self._bus.read_jobs(self._consumer, count, BLOCK_MS)
            count = _next_count(count, entries)
            await self._add(entries)

    async def _claim(self) -> None:
        """What an earlier leader read and did not finish with; now, and again for what it reads while it is deposed."""
        count = FIRST_READ
        while True:
            await self._room.wait()
            entries = await self._bus.claim_jobs(self._consumer, count)
            count = _next_count(count, entries)
            await self._add(entries)
            if not entries:
                await asyncio.sleep(CLAIM_S)

    async def _put_back(self) -> None:
        """Requests that were accepted and whose entries are gone: a producer that trims the inbox (XADD with MAXLEN)
        deletes what is others' too. Pushes that it deletes cannot be known."""
        while True:
            await asyncio.sleep(STRAY_S)
            live = await self._bus.scan_live()
            rids = [rid for rid in live if rid not in self._admitted and rid not in self._rids]
            for rid in await self._bus.strays(rids, int(STRAY_S * 1000)):
                if await self._bus.requeue(self._epoch, rid):
                    log.warning("somebody deleted the inbox entry of request %s: it is put back", rid)

    async def _add(self, entries: list[InboxEntry]) -> None:
        new = []
        for entry in entries:
            if entry.rid is not None and entry.payload is not None:  # can be neither: ended here
                await self._intake.take(entry)
            elif entry.entry_id not in self._held:
                new.append(entry)
        self._held.update(entry.entry_id for entry in new)
        rids = [entry.rid for entry in new if entry.rid is not None]
        self._rids.update(rids)
        self._weighed.update(dict.fromkeys(rids, False))
        weights = await self._bus.weigh_requests(rids)
        now = time.monotonic()
        for entry in new:
            if (rid := entry.rid) is not None:
                tenant, size, deadline_ms, cancelled = weights[rid]
                self._admission.add(Ticket(entry.entry_id, rid, sys.intern(tenant), size, deadline_ms), now)
                if self._weighed.pop(rid, False) or cancelled:
                    self._admission.cancelled(rid)
            else:
                self._admission.add(ticket := self._push(entry), now)
                if ticket.payload is None:  # to look into it has taken a millisecond or two
                    await asyncio.sleep(0)
        if len(self._admission) >= READ_AHEAD:
            self._room.clear()
        self._changed.set()

    def _push(self, entry: InboxEntry) -> Ticket:
        payload = entry.payload or b""
        found = address(payload)
        deadline_ms = entry_ms(entry) + int(found.timeout_s * 1000) if found.timeout_s else 0
        ticket = Ticket(
            entry.entry_id, None, sys.intern(found.tenant or DEFAULT_TENANT), len(payload), deadline_ms,
            origin=entry.origin,
        )  # fmt: skip
        if len(payload) <= SHORT and self._kept + len(payload) <= KEPT_BYTES:
            ticket.payload = payload
            self._kept += len(payload)
        return ticket

    async def _see_through(self, ticket: Ticket) -> None:
        try:
            payload = ticket.payload
            if payload is not None:
                self._kept -= len(payload)
            elif ticket.rid is None:
                payload = await self._bus.read_push(ticket.entry_id)
            there = ticket.rid is not None or payload is not None  # else somebody has deleted it
            entry = InboxEntry(ticket.entry_id, ticket.rid, payload, ticket.origin)
            wait_s = await self._intake.take(entry) if there else 0.0
        except BaseException:
            self._admission.done(ticket)
            raise
        if wait_s:
            ticket.payload = None  # it is read again
            self._admission.postpone(ticket, time.monotonic(), wait_s)
        else:
            self._admission.done(ticket)
            self._held.discard(ticket.entry_id)
            self._rids.discard(ticket.rid or "")
        self._changed.set()


def _next_count(count: int, entries: list[InboxEntry]) -> int:
    """How many entries to ask for after a read of ``count``: at first few, more while they are small."""
    largest = max((len(entry.payload or b"") for entry in entries), default=0)
    more = 2 * count if len(entries) == count else count
    return max(1, min(more, LARGEST_READ, READ_BYTES // max(1, largest)))
