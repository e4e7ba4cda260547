"""Assembly: one plan for one worker, and which waiting sequences start with it.

Decodes come first, one token each, out of one token budget; the rest goes to prefills, begun or waiting alike, in
queue order, in chunks. A sequence is started only when all its known tokens fit in blocks; a begun prefill keeps
them. Where a decode finds no block, the lowest class, newest first, gives up its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from protocol.messages import NewSequence, Plan, pack_ids
from scheduler.core import placement
from scheduler.core.lifecycle import Ledger
from scheduler.core.sequence import Sequence, State
from scheduler.core.waiting import CACHED_TOKEN_COST
from scheduler.core.worker import Flight, Lane, pack_seats


def _giving_way(sequence: Sequence) -> tuple[int, float, int, str]:
    """Order of giving way, last first: lower classes, then newer arrivals."""
    return (sequence.waiting_level, sequence.request.arrived, sequence.choice, sequence.request.rid)


class Assembly:
    def __init__(self, ledger: Ledger, lanes: Mapping[str, Lane], adaptive_chunks: bool) -> None:
        self._ledger = ledger
        self._lanes = lanes
        self._adaptive = adaptive_chunks

    def build(self, lane: Lane) -> Plan | None:
        """The next plan of ``lane``, entered as sent; None if there is nothing to send."""
        grown: dict[int, bytes] = {}
        decodes = 0
        rows: list[tuple[Sequence, int]] = []
        new: list[NewSequence] = []
        if lane.alone is None:
            self._make_room(lane)
            grown = self._grow_decodes(lane)
            decodes = len(lane.decoding)
            rows, new = self._prefills(lane, decodes)
        if lane.alone is not None and not (decodes or rows or lane.flights):
            rows, new = self._alone(lane, lane.alone)
        excused = lane.had_nothing or not lane.flights
        lane.had_nothing = not (decodes or rows)
        if lane.had_nothing and not lane.has_notices:
            return None
        return self._emit(lane, decodes, rows, new, grown, excused)

    # ----------------------------------------------------- decodes

    def _grow_decodes(self, lane: Lane) -> dict[int, bytes]:
        """One more block for each decode whose next token begins one, by seat."""
        grown: dict[int, bytes] = {}
        for sequence in lane.decoding.needing_block():
            while sequence.state is State.RUNNING and not lane.blocks.free:
                victim = self._victim(lane)
                grown.pop(victim.seat, None)
                self._ledger.preempt(victim)
            if sequence.state is State.RUNNING:
                block = lane.blocks.take()
                sequence.blocks.append(block)
                grown[sequence.seat] = pack_ids((block,))
        return grown

    def _make_room(self, lane: Lane) -> None:
        """Where the next in the queue finds room nowhere, lower classes give way to it: no priority inversion.

        Both sides count as aged, so that what has waited long is not put off for ever.
        """
        head = lane.assigned[0] if lane.assigned else self._ledger.queue.head()
        if head is None or head.needs_alone or lane.draining or head.target > lane.limit:
            return
        if not lane.assigned and any(self._has_room(head, other, lane) for other in self._lanes.values()):
            return
        lower = [s for s in lane.running_sequences() if s.waiting_level > head.waiting_level]
        if not placement.could_start(head, lane, lower):
            return
        while lower and not placement.can_start(head, lane):
            victim = max(lower, key=_giving_way)
            lower.remove(victim)
            self._ledger.preempt(victim)

    def _victim(self, lane: Lane) -> Sequence:
        """Lowest class, newest first."""
        return max(lane.running_sequences(), key=_giving_way)

    # ----------------------------------------------------- prefills

    def _prefills(self, lane: Lane, decodes: int) -> tuple[list[tuple[Sequence, int]], list[NewSequence]]:
        spent = 0
        rows: list[tuple[Sequence, int]] = []
        new: list[NewSequence] = []
        begun = sorted(lane.prefilling, key=lambda s: s.waiting_level) if lane.prefilling else []
        begun.reverse()
        while spent < lane.budget - decodes:
            waiting = lane.assigned[0] if lane.assigned else self._ledger.queue.head()
            head = None
            if waiting is not None and not (begun and begun[-1].waiting_level <= waiting.waiting_level):
                head = self._head_for(lane)
            if head is None and not begun:
                break
            sequence = head or begun.pop()
            room = self._allowance(lane, decodes, sequence) - spent
            if room <= 0:
                break
            if sequence is head:
                new.append(self._start(lane, sequence))
            count = self._chunk(lane, sequence, room)
            rows.append((sequence, count))
            spent += count
        return rows, new

    def _allowance(self, lane: Lane, decodes: int, sequence: Sequence) -> int:
        """Prefill tokens in this step, in all, if the next are those of ``sequence``."""
        budget = lane.budget - decodes
        if not (self._adaptive and decodes):
            return budget
        uncached = sequence.uncached
        if sequence.state is State.WAITING:
            uncached = sequence.known_tokens - placement.cached_blocks(sequence, lane) * lane.block_size
        waiting = min(self._ledger.queue.sequences + len(lane.assigned), lane.most_seqs - lane.running)
        return min(budget, lane.pace.chunk(decodes, uncached, len(lane.prefilling) + waiting))

    def _head_for(self, lane: Lane) -> Sequence | None:
        """Who starts on ``lane`` next, assigned to it; None if nobody may. Queue heads that are better off elsewhere
        are assigned there on the way, as far as the others have room: order is kept, nobody overtakes the head."""
        queue = self._ledger.queue
        while not lane.assigned:
            head = queue.head()
            if head is None or lane.alone is not None:
                return None
            serving = [other for other in self._lanes.values() if not other.draining]
            if not any(head.target <= other.limit for other in self._lanes.values()):
                queue.remove(head)
                self._ledger.parked[head] = None
                continue
            if head.needs_alone:
                able = [other for other in serving if other.alone is None and head.target <= other.limit]
            else:
                able = [other for other in serving if self._has_room(head, other, lane)]
            chosen = placement.choose(head, able)
            if chosen is None:
                return None
            queue.remove(head)
            head.lane = chosen
            if head.needs_alone:
                chosen.alone = head
            else:
                chosen.assigned.append(head)
        head = lane.assigned[0]
        return head if placement.can_start(head, lane) else None

    @staticmethod
    def _has_room(sequence: Sequence, lane: Lane, planning: Lane) -> bool:
        if lane is planning:
            return placement.can_start(sequence, lane)
        return placement.can_assign(sequence, lane)

    def _start(self, lane: Lane, sequence: Sequence) -> NewSequence:
        if lane.alone is not sequence:
            lane.assigned.remove(sequence)
        ledger, request = self._ledger, sequence.request
        known = sequence.known_tokens
        hits = placement.cached_blocks(sequence, lane)
        cached = hits * lane.block_size
        sequence.move(State.RUNNING)
        sequence.blocks = lane.blocks.start(
            sequence.prefix_hashes(lane.block_size)[:hits], placement.blocks_needed(sequence, lane)
        )
        sequence.seat = lane.free_seats.pop()
        lane.seats[sequence.seat] = sequence
        sequence.lane = lane
        sequence.top_placement += 1
        sequence.placement = sequence.top_placement
        sequence.known = known
        sequence.computed = cached
        sequence.uncached = known - cached
        lane.prefilling.append(sequence)
        ledger.counters.prefix_queries += known
        ledger.counters.prefix_hits += cached
        if not sequence.served:  # recomputed tokens are free
            sequence.served = True
            ledger.queue.charge(request.tenant, known - cached + CACHED_TOKEN_COST * cached)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = cached
        if request.first_planned is None:
            request.first_planned = ledger.now
        return NewSequence(
            seat=sequence.seat,
            rid=request.rid,
            choice=sequence.choice,
            placement=sequence.placement,
            token_ids=pack_ids(sequence.prompt + sequence.output),
            prompt_len=len(sequence.prompt),
            sampling=sequence.sampling,
            seed=request.seed,
            cursor=sequence.cursor,
            block_table=pack_ids(sequence.blocks),
            computed=cached,
            cached_tokens=sequence.cached_tokens,
            id=request.id,
            wants_result=request.wants_result,
        )

    def _chunk(self, lane: Lane, sequence: Sequence, budget: int) -> int:
        """Plan the next up to ``budget`` tokens of a prefill. Blocks that this fills can be shared from now on."""
        size = lane.block_size
        count = min(sequence.known - sequence.computed, budget)
        first = sequence.computed // size
        sequence.computed += count
        hashes = sequence.prefix_hashes(size)
        for k in range(first, min(sequence.computed // size, len(hashes))):
            lane.blocks.publish(sequence.blocks[k], hashes[k])
        return count

    def _alone(self, lane: Lane, sequence: Sequence) -> tuple[list[tuple[Sequence, int]], list[NewSequence]]:
        """Nothing is outstanding: one step for ``sequence`` and nobody else; others give up blocks if it needs them."""
        new: list[NewSequence] = []
        if sequence.state is State.WAITING:
            while not placement.can_start(sequence, lane) and lane.running:
                self._ledger.preempt(self._victim(lane))
            if not placement.can_start(sequence, lane):
                return [], []
            new.append(self._start(lane, sequence))
        return [(sequence, self._chunk(lane, sequence, lane.budget))], new

    # ----------------------------------------------------- the plan

    def _emit(
        self,
        lane: Lane,
        decodes: int,
        rows: list[tuple[Sequence, int]],
        new: list[NewSequence],
        grown: dict[int, bytes],
        excused: bool,
    ) -> Plan:
        lane.step += 1
        complete = [sequence for sequence, _ in rows if sequence.computed == sequence.known]
        seats = lane.decoding.packed_seats() if decodes else b""
        counts = samples = b""
        if rows:
            seats += pack_seats([sequence.seat for sequence, _ in rows])
            counts = pack_ids([1] * decodes + [count for _, count in rows])
            samples = b"\1" * decodes + bytes(sequence.computed == sequence.known for sequence, _ in rows)
        plan = Plan(
            epoch=0,
            gen=lane.gen,
            step=lane.step,
            seats=seats,
            counts=counts,
            samples=samples,
            new=new,
            blocks=list(grown.items()),
            ends=lane.ends,
            frees=lane.frees,
        )
        prefill_tokens = sum(count for _, count in rows)
        lane.flights.append(
            Flight(
                step=lane.step,
                sent=self._ledger.now,
                seats=seats,
                samples=samples,
                sampling_rows=decodes + len(complete),
                decode_rows=decodes,
                prefill_tokens=prefill_tokens,
                expected_s=lane.pace.step_s(decodes, prefill_tokens),
                to_idle=not lane.flights,
                excused=excused,
                vacated=[*lane.frees, *(seat for seat, _ in lane.ends)],
                first=complete,
                alone=lane.alone if rows else None,
            )
        )
        for seat, _ in lane.ends:
            ending = lane.seats[seat]
            assert ending is not None
            ending.last_step = lane.step
        lane.ends, lane.frees = [], []
        self._advance(lane, decodes, complete)
        self._ledger.counters.prompt_tokens += prefill_tokens
        for tenant, members in lane.decoding.tenants.items():
            self._ledger.queue.charge(tenant, members)
        return plan

    def _advance(self, lane: Lane, decodes: int, complete: list[Sequence]) -> None:
        """After the plan, computed and known are what they will be when it is done."""
        finished = lane.decoding.advance() if decodes else []
        for sequence in complete:
            lane.prefilling.remove(sequence)
            sequence.known += 1
            if sequence.known < sequence.target:
                lane.decoding.join(sequence)
            else:
                finished.append(sequence)
        for sequence in finished:  # all its tokens are planned; the hints will tell of its end
            sequence.last_step = lane.step
            lane.departing[sequence] = None
