"""BatchBuilder: one plan for one worker, and which waiting sequences start with it.

Decodes come first, one token each, out of one token budget; the rest goes to prefills, begun or waiting alike, in
queue order, in chunks. A sequence is started only when all its known tokens fit in blocks; a begun prefill keeps
them. If no block is free for a decode, sequences of the lowest class are preempted, newest first.
"""

from __future__ import annotations

from collections.abc import Mapping

from protocol.messages import PAIR_BYTES, NewSequence, Plan, pack_ids, pack_seats
from scheduler.core import placement
from scheduler.core.lifecycle import Lifecycle
from scheduler.core.sequence import Sequence, State
from scheduler.core.waiting import CACHED_TOKEN_COST
from scheduler.core.worker import LEAST_STEP_S, InFlightBatch, WorkerState

LEAST_SHARE = 64  # prefill tokens of a step: fewer are not worth evening out between the stages of a pipeline
MOST_PASSED = 64  # heads of the queue that wait for other weights, in one look


def _giving_way(sequence: Sequence) -> tuple[int, float, int, str]:
    """Sort key for preemption; the largest is preempted first: lower classes, then newer arrivals."""
    return (sequence.waiting_level, sequence.request.arrived, sequence.choice, sequence.request.rid)


class BatchBuilder:
    def __init__(self, lifecycle: Lifecycle, workers: Mapping[str, WorkerState], adaptive_chunks: bool) -> None:
        self._lifecycle = lifecycle
        self._workers = workers
        self._adaptive = adaptive_chunks

    def build(self, worker: WorkerState) -> Plan | None:
        """The next plan of ``worker``, entered as sent; None if there is nothing to send."""
        grown: dict[int, bytes] = {}
        decodes = 0
        rows: list[tuple[Sequence, int]] = []
        new: list[NewSequence] = []
        if worker.quarantined is None:
            self._make_room(worker)
            grown = self._grow_decodes(worker)
            decodes = len(worker.decoding)
            rows, new = self._prefills(worker, decodes)
        if worker.quarantined is not None and not (decodes or rows or worker.in_flight):
            rows, new = self._quarantine(worker, worker.quarantined)
        excused = worker.had_nothing or not worker.in_flight
        worker.had_nothing = not (decodes or rows)
        if worker.had_nothing and not worker.has_notices:
            return None
        return self._emit(worker, decodes, rows, new, grown, excused)

    # ----------------------------------------------------- decodes

    def _grow_decodes(self, worker: WorkerState) -> dict[int, bytes]:
        """One more block for each decode whose next token begins one, by seat. Of the groups that take turns, the next
        that has members afterwards."""
        grown: dict[int, bytes] = {}
        for _ in worker.groups:
            worker.take_turn()
            self._grow(worker, grown)
            if worker.decoding:
                break
        return grown

    def _grow(self, worker: WorkerState, grown: dict[int, bytes]) -> None:
        for sequence in worker.decoding.needing_block():
            while sequence.state is State.RUNNING and not worker.blocks.free:
                victim = self._victim(worker)
                grown.pop(victim.seat, None)
                self._lifecycle.preempt(victim)
            if sequence.state is State.RUNNING:
                block = worker.blocks.take()
                sequence.blocks.append(block)
                grown[sequence.seat] = pack_ids((block,))

    def _make_room(self, worker: WorkerState) -> None:
        """If the head of the queue fits nowhere, preempt sequences of lower classes for it: no priority inversion.

        Both sides count with their age, so that what has waited long is not postponed for ever.
        """
        head = worker.assigned[0] if worker.assigned else self._lifecycle.queue.head()
        if head is None or head.needs_quarantine or worker.draining or not worker.fits(head):
            return
        if not worker.assigned and any(self._has_room(head, other, worker) for other in self._workers.values()):
            return
        lower = [s for s in worker.running_sequences() if s.waiting_level > head.waiting_level]
        if not placement.could_start(head, worker, lower):
            return
        while lower and not placement.can_start(head, worker):
            victim = max(lower, key=_giving_way)
            lower.remove(victim)
            self._lifecycle.preempt(victim)

    def _victim(self, worker: WorkerState) -> Sequence:
        """Lowest class, newest first."""
        return max(worker.running_sequences(), key=_giving_way)

    # ----------------------------------------------------- prefills

    def _prefills(self, worker: WorkerState, decodes: int) -> tuple[list[tuple[Sequence, int]], list[NewSequence]]:
        spent = 0
        logits = worker.most_seqs - decodes  # rows that may be left: a worker has memory for so many
        rows: list[tuple[Sequence, int]] = []
        new: list[NewSequence] = []
        begun = sorted(filter(worker.is_ready, worker.prefilling), key=lambda s: s.waiting_level)
        begun.reverse()
        while spent < worker.budget - decodes and logits > 0:
            waiting = worker.assigned[0] if worker.assigned else self._lifecycle.queue.head()
            head = None
            if waiting is not None and not (begun and begun[-1].waiting_level <= waiting.waiting_level):
                head = self._assign_next(worker)
            if head is None and not begun:
                break
            sequence = head or begun.pop()
            room = self._allowance(worker, decodes, sequence) - spent
            if room <= 0:
                break
            if sequence is head:
                new.append(self._start(worker, sequence))
                if (decodes or rows) and not worker.is_ready(sequence):
                    continue  # its blocks are copied beside these
            count = self._chunk(worker, sequence, room, logits)
            rows.append((sequence, count))
            spent += count
            logits -= count if sequence.scores_prompt else 1
        if not (decodes or rows) and worker.prefilling:  # nothing else is to be done meanwhile
            sequence = min(worker.prefilling, key=lambda s: s.ready_s)
            rows.append((sequence, self._chunk(worker, sequence, worker.budget, worker.most_seqs)))
        return rows, new

    def _allowance(self, worker: WorkerState, decodes: int, sequence: Sequence) -> int:
        """Prefill tokens in this step, in all, if the next are those of ``sequence``."""
        budget = worker.budget - decodes
        if not (self._adaptive and decodes):
            return budget
        uncached = sequence.uncached
        if sequence.state is State.WAITING:
            uncached = sequence.known_tokens - placement.cached_blocks(sequence, worker) * worker.block_size
        if worker.stages > 1:  # steps of one length, as many as there are stages, keep all of these busy
            budget = min(budget, max(LEAST_SHARE, -(-max(uncached, worker.backlog()) // worker.stages)))
        waiting = min(self._lifecycle.queue.sequences + len(worker.assigned), worker.most_seqs - worker.running)
        return min(budget, worker.step_time.chunk(decodes, uncached, len(worker.prefilling) + waiting))

    def _assign_next(self, worker: WorkerState) -> Sequence | None:
        """Assign sequences from the queue's head to workers until ``worker`` has one; it, or None if none may start
        there. Heads that are better off elsewhere are assigned there, as far as the others have room: order is kept,
        none overtakes the head, but where the head waits for weights that this worker does not have."""
        passed: list[Sequence] = []
        found = self._assign_past(worker, passed)
        for sequence in passed:
            self._lifecycle.queue.push(sequence, self._lifecycle.now)
        return found

    def _assign_past(self, worker: WorkerState, passed: list[Sequence]) -> Sequence | None:
        """As _assign_next. ``passed`` gets heads with other weights, taken out of the queue."""
        queue = self._lifecycle.queue
        while not worker.assigned:
            head = queue.head()
            if head is None or worker.quarantined is not None:
                return None
            serving = [other for other in self._workers.values() if not other.draining]
            if not any(other.fits(head) for other in serving or self._workers.values()):
                queue.remove(head)
                self._lifecycle.park(head, serving)
                continue
            if head.needs_quarantine:
                able = [other for other in serving if other.quarantined is None and other.fits(head)]
            else:
                able = [other for other in serving if self._has_room(head, other, worker)]
            chosen = placement.choose(head, able)
            if chosen is None and (len(passed) == MOST_PASSED or head.request.may_run_at(worker.fingerprint)):
                return None
            queue.remove(head)
            if chosen is None:
                passed.append(head)
                continue
            self._lifecycle.worker_of[head] = chosen
            if head.needs_quarantine:
                chosen.quarantined = head
            else:
                chosen.assigned.append(head)
        head = worker.assigned[0]
        return head if placement.can_start(head, worker) else None

    @staticmethod
    def _has_room(sequence: Sequence, worker: WorkerState, planning: WorkerState) -> bool:
        if worker is planning:
            return placement.can_start(sequence, worker)
        return placement.can_assign(sequence, worker)

    def _start(self, worker: WorkerState, sequence: Sequence) -> NewSequence:
        if worker.quarantined is not sequence:
            worker.assigned.remove(sequence)
        lifecycle, request = self._lifecycle, sequence.request
        request.place_at(worker.fingerprint)
        sequence.stranded = None
        known = sequence.known_tokens
        hits = placement.cached_blocks(sequence, worker)
        cached = hits * worker.block_size
        sequence.move(State.RUNNING)
        sequence.blocks = worker.blocks.start(
            sequence.prefix_hashes(worker.block_size)[:hits], placement.blocks_needed(sequence, worker)
        )
        worker.expect_copies(sequence, hits)
        sequence.seat = worker.free_seats.pop()
        worker.seats[sequence.seat] = sequence
        lifecycle.worker_of[sequence] = worker
        sequence.top_placement += 1
        sequence.placement = sequence.top_placement
        sequence.known = known
        sequence.computed = cached
        sequence.uncached = known - cached
        sequence.prefix_hits.clear()
        worker.prefilling.append(sequence)
        lifecycle.counters.prefix_queries += known
        lifecycle.counters.prefix_hits += cached
        if not sequence.served:  # recomputed tokens are free
            sequence.served = True
            lifecycle.queue.charge(request.tenant, known - cached + CACHED_TOKEN_COST * cached)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = cached
        if request.first_planned is None:
            request.first_planned = lifecycle.now
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

    def _chunk(self, worker: WorkerState, sequence: Sequence, budget: int, logits: int) -> int:
        """Plan the next up to ``budget`` tokens of a prefill. Blocks that this fills can be shared from now on.

        ``logits``: rows of logits that the step may have. A prompt whose own logprobs are asked for needs one for each
        of its tokens.
        """
        size = worker.block_size
        count = min(sequence.known - sequence.computed, budget, logits if sequence.scores_prompt else budget)
        first = sequence.computed // size
        sequence.computed += count
        hashes = sequence.prefix_hashes(size)
        for k in range(first, min(sequence.computed // size, len(hashes))):
            worker.blocks.publish(sequence.blocks[k], hashes[k])
        return count

    def _quarantine(
        self, worker: WorkerState, sequence: Sequence
    ) -> tuple[list[tuple[Sequence, int]], list[NewSequence]]:
        """Nothing is outstanding: one step for ``sequence`` alone; others are preempted if it needs their blocks."""
        new: list[NewSequence] = []
        if sequence.state is State.WAITING:
            while not placement.can_start(sequence, worker) and worker.running:
                self._lifecycle.preempt(self._victim(worker))
            if not placement.can_start(sequence, worker):
                return [], []
            new.append(self._start(worker, sequence))
        return [(sequence, self._chunk(worker, sequence, worker.budget, worker.most_seqs))], new

    # ----------------------------------------------------- the plan

    def _emit(
        self,
        worker: WorkerState,
        decodes: int,
        rows: list[tuple[Sequence, int]],
        new: list[NewSequence],
        grown: dict[int, bytes],
        excused: bool,
    ) -> Plan:
        worker.step += 1
        copies_out, copies_in = worker.blocks.take_copies(worker.budget // worker.block_size)
        complete = [sequence for sequence, _ in rows if sequence.computed == sequence.known]
        seats = worker.decoding.packed_seats() if decodes else b""
        counts = samples = b""
        if rows:
            seats += pack_seats([sequence.seat for sequence, _ in rows])
            counts = pack_ids([1] * decodes + [count for _, count in rows])
            samples = b"\1" * decodes + bytes(sequence.computed == sequence.known for sequence, _ in rows)
        plan = Plan(
            epoch=0,
            gen=worker.gen,
            step=worker.step,
            seats=seats,
            counts=counts,
            samples=samples,
            new=new,
            blocks=list(grown.items()),
            ends=worker.ends,
            frees=worker.frees,
            copies_out=copies_out,
            copies_in=copies_in,
        )
        prefill_tokens = sum(count for _, count in rows)
        expected_s = worker.step_time.step_s(decodes, prefill_tokens)
        worker.planned_s += max(expected_s, LEAST_STEP_S)
        worker.in_flight.append(
            InFlightBatch(
                step=worker.step,
                sent=self._lifecycle.now,
                seats=seats,
                samples=samples,
                sampling_rows=decodes + len(complete),
                decode_rows=decodes,
                prefill_tokens=prefill_tokens,
                expected_s=expected_s,
                to_idle=not worker.in_flight,
                excused=excused,
                vacated=[*worker.frees, *(seat for seat, _ in worker.ends)],
                first=complete,
                quarantined=worker.quarantined if rows else None,
            )
        )
        for seat, _ in worker.ends:
            ending = worker.seats[seat]
            assert ending is not None
            ending.last_step = worker.step
        worker.ends, worker.frees = [], []
        tenants = dict(worker.decoding.tenants) if worker.stages > 1 else worker.decoding.tenants
        self._advance(worker, decodes, complete)
        counters = self._lifecycle.counters
        counters.prompt_tokens += prefill_tokens
        counters.blocks_saved += len(copies_out) // PAIR_BYTES
        counters.blocks_loaded += len(copies_in) // PAIR_BYTES
        counters.host_hits += len(copies_in) // PAIR_BYTES * worker.block_size
        for tenant, members in tenants.items():
            self._lifecycle.queue.charge(tenant, members)
        return plan

    def _advance(self, worker: WorkerState, decodes: int, complete: list[Sequence]) -> None:
        """After the plan, computed and known are what they will be when it is done."""
        finished = worker.decoding.advance() if decodes else []
        for sequence in complete:
            worker.prefilling.remove(sequence)
            sequence.known += 1
            if sequence.known < sequence.target:
                worker.join(sequence)
            else:
                finished.append(sequence)
        worker.turn = (worker.turn + 1) % worker.stages
        for sequence in finished:  # all its tokens are planned; the hints will report its end
            sequence.last_step = worker.step
            worker.departing[sequence] = None
