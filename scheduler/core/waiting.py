"""The waiting queue: class, then weighted fair share among tenants, then arrival; and ageing, so that nothing starves.

Fair share is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., 2023): each
tenant's counter grows by the tokens it was served, over its weight, and the tenant with the smallest counter goes next.
A tenant that becomes active starts no lower than the smallest active one: being idle gives no credit. Counters only
grow, so heaps of tenants may hold old values: an entry is refreshed when it comes to the top.

Levels: 1, 2, 3 are the classes interactive, standard, batch. Every ``aging_s`` of waiting raises a sequence by one
level; at level 0 only arrival counts, so that no tenant waits for ever.
All operations are O(log n); nothing is ever sorted as a whole.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping

from protocol.messages import PRIORITIES
from scheduler.core.sequence import Sequence

LEVELS = len(PRIORITIES) + 1
MOST_COUNTERS = 1024  # of inactive tenants, before those without effect are dropped
CACHED_TOKEN_COST = 0.1  # charge for a prefix-cached token, relative to a computed one


class WaitingQueue:
    def __init__(self, weights: Mapping[str, float] | None = None, aging_s: float = 30.0) -> None:
        self._weights = dict(weights or {})
        self._aging_s = aging_s
        self._entries = itertools.count(1)
        # per level: tenant -> heap of (arrived, entry, sequence); level 0 has them all under one name
        self._heaps: list[dict[str, list[tuple[float, int, Sequence]]]] = [{} for _ in range(LEVELS)]
        self._order: list[list[tuple[float, str]]] = [[] for _ in range(LEVELS)]  # heaps of (counter, tenant)
        self._due: list[tuple[float, int, Sequence]] = []  # heap: when to raise which sequence
        self._counters: dict[str, float] = {}
        self._active: dict[str, int] = {}  # tenant -> its sequences that wait or run
        self._active_order: list[tuple[float, str]] = []
        self._floor = 0.0  # where a tenant starts when no other is active
        self._forget_at = MOST_COUNTERS
        self._charged: dict[str, float] = {}  # tenant -> what it was charged since `take_charged`
        self.waiting: dict[str, list[int]] = {}  # tenant -> [requests, tokens] that wait
        self.classes = [0] * len(PRIORITIES)  # requests that wait, by the class that they came with
        self.sequences = 0

    # ------------------------------------------------------------- shares

    def enter(self, tenant: str) -> None:
        """One more live sequence of this tenant. A newly active one is lifted to the smallest active counter."""
        if tenant not in self._active:
            floor = self._smallest_active()
            if len(self._counters) >= self._forget_at:
                self._forget(floor)
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), floor)
            heapq.heappush(self._active_order, (self._counters[tenant], tenant))
        self._active[tenant] = self._active.get(tenant, 0) + 1

    def leave(self, tenant: str) -> None:
        """One live sequence of this tenant less."""
        self._active[tenant] -= 1
        if not self._active[tenant]:
            if len(self._active) == 1:  # the last one: the next active tenant starts here
                self._floor = self._counters[tenant]
            del self._active[tenant]

    def _forget(self, floor: float) -> None:
        """Drop counters that would be raised to ``floor`` anyway: clients choose tenants' names, so they must be
        bounded."""
        self._counters = {t: c for t, c in self._counters.items() if c > floor or t in self._active}
        self._forget_at = max(MOST_COUNTERS, 2 * len(self._counters))

    def _smallest_active(self) -> float:
        order = self._active_order
        while order:
            counter, tenant = order[0]
            if tenant not in self._active:
                heapq.heappop(order)
            elif counter < self._counters[tenant]:
                heapq.heapreplace(order, (self._counters[tenant], tenant))
            else:
                return counter
        return self._floor

    def charge(self, tenant: str, tokens: float) -> None:
        self._counters[tenant] += tokens / self._weights.get(tenant, 1.0)
        self._charged[tenant] = self._charged.get(tenant, 0.0) + tokens

    def active_tenants(self) -> list[str]:
        return list(self._active)

    def take_charged(self) -> dict[str, float]:
        """Tokens that each tenant was served since this was called last."""
        charged, self._charged = self._charged, {}
        return charged

    def charge_elsewhere(self, served: Mapping[str, float], most: float) -> None:
        """Count what active tenants were served in other shards of the model: their shares hold over all of them. What
        a tenant is ahead of the others by this is at most ``most`` tokens, so that nobody waits long for having been
        served where nobody else wanted to be."""
        for tenant, tokens in served.items():
            if tenant in self._active:
                weight = self._weights.get(tenant, 1.0)
                before = self._counters[tenant]
                bound = max(before, self._smallest_active() + most / weight)
                self._counters[tenant] = min(before + tokens / weight, bound)

    # -------------------------------------------------------------- queue

    def push(self, sequence: Sequence, now: float) -> None:
        """Queue ``sequence``, new or put back. Its position follows from class, tenant and arrival."""
        request = sequence.request
        waited = now - request.arrived
        raised = int(waited / self._aging_s) if waited > 0 else 0
        level = max(0, request.level + 1 - raised)
        self._insert(sequence, level)
        if level > 0:
            due = request.arrived + (raised + 1) * self._aging_s
            heapq.heappush(self._due, (due, sequence.entry, sequence))
        counts = self.waiting.setdefault(request.tenant, [0, 0])
        counts[0] += request.waiting == 0
        self.classes[request.level] += request.waiting == 0
        counts[1] += sequence.known_tokens
        request.waiting += 1
        self.sequences += 1

    def remove(self, sequence: Sequence) -> None:
        """Remove ``sequence``. Its entry stays in the heap and is skipped."""
        assert sequence.entry, "not queued"
        sequence.entry = 0
        request = sequence.request
        request.waiting -= 1
        counts = self.waiting[request.tenant]
        counts[0] -= request.waiting == 0
        self.classes[request.level] -= request.waiting == 0
        counts[1] -= sequence.known_tokens
        if not counts[0]:
            del self.waiting[request.tenant]
        self.sequences -= 1

    def head(self) -> Sequence | None:
        """The next sequence, still queued; None if the queue is empty."""
        for level in range(LEVELS):
            sequence = self._head_of(level)
            if sequence is not None:
                return sequence
        return None

    def oldest(self) -> float | None:
        """When the request arrived that has waited longest. Looks at one entry for each tenant that waits."""
        arrivals = []
        for heap in (heap for heaps in self._heaps for heap in heaps.values()):
            while heap and heap[0][2].entry != heap[0][1]:
                heapq.heappop(heap)
            if heap:
                arrivals.append(heap[0][0])
        return min(arrivals, default=None)

    def age(self, now: float) -> None:
        """Raise every sequence that has waited long enough in its level."""
        while self._due and self._due[0][0] <= now:
            due, entry, sequence = heapq.heappop(self._due)
            if sequence.entry != entry:
                continue
            level = sequence.waiting_level - 1
            self._insert(sequence, level)
            if level > 0:
                heapq.heappush(self._due, (due + self._aging_s, sequence.entry, sequence))

    def __iter__(self) -> Iterator[Sequence]:
        """All queued sequences, in no order."""
        for heaps in self._heaps:
            for heap in heaps.values():
                yield from (sequence for _, entry, sequence in heap if sequence.entry == entry)

    def _insert(self, sequence: Sequence, level: int) -> None:
        sequence.entry = next(self._entries)
        sequence.waiting_level = level
        tenant = sequence.request.tenant
        name = tenant if level > 0 else ""
        heap = self._heaps[level].get(name)
        if heap is None:
            heap = self._heaps[level][name] = []
            heapq.heappush(self._order[level], (self._counters[tenant] if name else 0.0, name))
        heapq.heappush(heap, (sequence.request.arrived, sequence.entry, sequence))

    def _head_of(self, level: int) -> Sequence | None:
        order, heaps = self._order[level], self._heaps[level]
        while order:
            counter, name = order[0]
            heap = heaps[name]
            while heap and heap[0][2].entry != heap[0][1]:
                heapq.heappop(heap)
            if not heap:
                heapq.heappop(order)
                del heaps[name]
            elif level > 0 and counter < self._counters[name]:
                heapq.heapreplace(order, (self._counters[name], name))
            else:
                return heap[0][2]
        return None

    def check_integrity(self) -> None:
        queued = list(self)
        assert len(queued) == self.sequences == len({id(s) for s in queued})
        tokens: dict[str, list[int]] = {}
        for sequence in queued:
            counts = tokens.setdefault(sequence.request.tenant, [0, 0])
            counts[1] += sequence.known_tokens
        for request in {id(s.request): s.request for s in queued}.values():
            tokens[request.tenant][0] += 1
        assert tokens == self.waiting, "waiting counts differ from the queue"
        assert sum(self.classes) == sum(requests for requests, _ in tokens.values())
        assert min(self.classes) >= 0
