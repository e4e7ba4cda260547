"""The order in which jobs of the inbox are prepared and admitted. Pure: tickets and times in, tickets out.

Jobs cost by their bytes, and so are shared out: start-time fair queueing between tenants (Goyal, Vin, Cheng 1996),
weighted as their served tokens are. Short jobs and long ones have queues and places of their own, so that no long text
stands before a short one; within a tenant's queue shorter ones go first, and age. A tenant may have so many bytes in
preparation and no more. What needs no preparation, being cancelled or late already, goes before all.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol.records import Origin

LEAST_COST = 1 << 10  # bytes; what a job costs besides its text
AGEING = 64 << 10  # bytes: a text so much longer lets a shorter one of its tenant pass that comes a second later
MOST_TENANTS = 1024  # that are remembered although nothing of theirs waits


@dataclass(slots=True, eq=False)
class Ticket:
    """One entry of the inbox that waits. ``payload``: a push that is small enough to be kept meanwhile."""

    entry_id: str
    rid: str | None
    tenant: str
    size: int  # bytes
    deadline_ms: int = 0  # server time; 0: none
    payload: bytes | None = None
    origin: Origin | None = None
    waits: bool = field(default=True)  # False: handed out already, or moved to another queue


@dataclass
class _Tenant:
    waiting: list[tuple[float, int, Ticket]] = field(default_factory=list)  # a heap
    tag: float = 0.0  # virtual time at which its next job starts
    in_flight: int = 0  # bytes


class FairQueue:
    """Jobs of one kind: at most ``places`` in preparation at once, of one tenant ``tenant_bytes`` unless it is one."""

    def __init__(self, places: int, tenant_bytes: int, weights: Mapping[str, float]) -> None:
        self._places = places
        self._tenant_bytes = tenant_bytes
        self._weights = weights
        self._tenants: dict[str, _Tenant] = {}
        self._clock = 0.0  # virtual time
        self._arrivals = 0

    def add(self, ticket: Ticket, now: float) -> None:
        """``now``: seconds of any clock that does not go back."""
        tenant = self._tenants.get(ticket.tenant)
        if tenant is None:
            self._forget()
            tenant = self._tenants[ticket.tenant] = _Tenant()
        if not tenant.waiting:
            tenant.tag = max(tenant.tag, self._clock)
        self._arrivals += 1
        heapq.heappush(tenant.waiting, (now + ticket.size / AGEING, self._arrivals, ticket))

    def next(self) -> Ticket | None:
        """The job whose turn it is, if there is a place for it."""
        if not self._places:
            return None
        ready = [t for t in self._tenants.values() if self._head(t) is not None and self._may(t)]
        if not ready:
            return None
        tenant = min(ready, key=lambda t: t.tag)
        _, _, ticket = heapq.heappop(tenant.waiting)
        ticket.waits = False
        self._clock = tenant.tag
        tenant.tag += _cost(ticket) / self._weights.get(ticket.tenant, 1.0)
        tenant.in_flight += _cost(ticket)
        self._places -= 1
        return ticket

    def done(self, ticket: Ticket) -> None:
        """A job that `next` gave is admitted or ended."""
        self._places += 1
        self._tenants[ticket.tenant].in_flight -= _cost(ticket)

    def _head(self, tenant: _Tenant) -> Ticket | None:
        while tenant.waiting and not tenant.waiting[0][2].waits:
            heapq.heappop(tenant.waiting)
        return tenant.waiting[0][2] if tenant.waiting else None

    def _may(self, tenant: _Tenant) -> bool:
        return not tenant.in_flight or tenant.in_flight + _cost(tenant.waiting[0][2]) <= self._tenant_bytes

    def _forget(self) -> None:
        """Tenants that have nothing here, and with them what their last job has cost."""
        if len(self._tenants) >= MOST_TENANTS:
            self._tenants = {name: t for name, t in self._tenants.items() if t.waiting or t.in_flight}


def _cost(ticket: Ticket) -> int:
    return max(ticket.size, LEAST_COST)


@dataclass
class _Limited:
    """Pushes of a tenant that is at a limit, in order. ``tried``: the one that is out to see whether it still is."""

    tickets: deque[Ticket] = field(default_factory=deque)
    until: float = 0.0
    tried: Ticket | None = None


class Admission:
    """Every ticket, from its reading to its end."""

    def __init__(self, short: FairQueue, long: FairQueue, longest_short: int, urgent_places: int) -> None:
        self._short, self._long = short, long
        self._longest_short = longest_short
        self._urgent: deque[Ticket] = deque()
        self._urgent_places = urgent_places
        self._from: dict[Ticket, FairQueue | None] = {}  # handed out; None: it was urgent
        self._by_rid: dict[str, Ticket] = {}  # of those that wait
        self._deadlines: list[tuple[int, int, Ticket]] = []  # a heap
        self._limited: dict[str, _Limited] = {}  # by tenant
        self._waiting = 0
        self._added = 0

    def __len__(self) -> int:
        """Tickets that wait."""
        return self._waiting

    def add(self, ticket: Ticket, now: float) -> None:
        self._count(ticket)
        limited = self._limited.get(ticket.tenant) if ticket.rid is None else None
        if limited is not None:
            limited.tickets.append(ticket)
        else:
            self._queue_of(ticket).add(ticket, now)

    def _count(self, ticket: Ticket) -> None:
        self._waiting += 1
        self._added += 1
        if ticket.rid is not None:
            self._by_rid[ticket.rid] = ticket
        if ticket.deadline_ms:
            heapq.heappush(self._deadlines, (ticket.deadline_ms, self._added, ticket))

    def _queue_of(self, ticket: Ticket) -> FairQueue:
        return self._short if ticket.size <= self._longest_short else self._long

    def next(self, now: float = 0.0) -> Ticket | None:
        """The next ticket to be seen through, if there is a place for it. Give it back by `done`."""
        self._release(now)
        ticket, queue = self._next()
        if ticket is not None:
            self._waiting -= 1
            self._from[ticket] = queue
            if ticket.rid is not None:
                self._by_rid.pop(ticket.rid, None)
        return ticket

    def _next(self) -> tuple[Ticket | None, FairQueue | None]:
        if self._urgent and self._urgent_places:
            self._urgent_places -= 1
            return self._urgent.popleft(), None
        for queue in (self._short, self._long):
            if (ticket := queue.next()) is not None:
                return ticket, queue
        return None, None

    def done(self, ticket: Ticket) -> None:
        queue = self._from.pop(ticket)
        limited = self._limited.get(ticket.tenant)
        if limited is not None and limited.tried is ticket:
            limited.tried = None
        if queue is None:
            self._urgent_places += 1
        else:
            queue.done(ticket)

    def postpone(self, ticket: Ticket, now: float, wait_s: float) -> None:
        """A push that was handed out meets a limit of its tenant: it and all later ones of the tenant wait, and are
        then tried one after the other, so that none is prepared again and again."""
        self.done(ticket)
        limited = self._limited.setdefault(ticket.tenant, _Limited())
        limited.until = now + wait_s
        again = dataclasses.replace(ticket, waits=True)
        limited.tickets.appendleft(again)
        self._count(again)

    def _release(self, now: float) -> None:
        for tenant, limited in list(self._limited.items()):
            if limited.tried is not None or limited.until > now:
                continue
            while limited.tickets and not limited.tickets[0].waits:  # cancelled or late: it is handed out already
                limited.tickets.popleft()
            if not limited.tickets:
                del self._limited[tenant]
                continue
            limited.tried = limited.tickets.popleft()
            self._queue_of(limited.tried).add(limited.tried, now)

    def cancelled(self, rid: str) -> bool:
        """Request ``rid`` needs no preparation any more. False: it does not wait here."""
        ticket = self._by_rid.get(rid)
        return ticket is not None and self._hasten(ticket)

    def late(self, now_ms: int) -> bool:
        """Hasten what is beyond its deadline by server time ``now_ms``; whether there was any."""
        any_late = False
        while self._deadlines and self._deadlines[0][0] <= now_ms:
            any_late |= self._hasten(heapq.heappop(self._deadlines)[2])
        return any_late

    def _hasten(self, ticket: Ticket) -> bool:
        if not ticket.waits:
            return False
        ticket.waits = False
        self._urgent.append(ticket)
        return True
