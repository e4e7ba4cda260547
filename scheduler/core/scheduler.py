"""The scheduler's core: which tokens are computed where, step after step. Events and ``now`` in, effects out.

Schedule token counts, not phases: the computed tokens of every sequence follow its known tokens. Plans are sent before
the hints of earlier ones arrive: after a row that samples, the next known token is "one more" whose id only the worker
knows. No await, no clock, no Redis: ``now`` comes from any monotonic clock, the same for all calls.

    core.apply(event, now) -> effects      for every event, in order
    core.plan(now) -> effects              whenever woken; the only one that sends plans
    core.next_wake(now) -> when to call plan although no event came

A little over 400 lines: one class, whose handlers of events are short and read best beside each other.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from protocol.errors import EngineFailed
from protocol.messages import CLOSED, ID_BYTES, LANDED, PRIORITIES, unpack_ids
from scheduler.core import events
from scheduler.core.batch import BatchBuilder
from scheduler.core.events import ChoiceState, Effect, Event
from scheduler.core.lifecycle import Counters, Lifecycle
from scheduler.core.sequence import Request, Sequence, State, append_ids
from scheduler.core.waiting import WaitingQueue
from scheduler.core.worker import InFlightBatch, WorkerState

LATE_S = 1e-4  # a shorter wait of the device is not counted as a late plan


@dataclass(frozen=True)
class CoreConfig:
    """None takes the worker's own figure."""

    max_model_len: int | None = None  # for prompts that arrive before the first worker
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None  # None also makes prefill chunks adapt to what running decodes stand
    plans_ahead: int = 16  # most plans outstanding at one worker
    aging_s: float = 30.0
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    inter_token_target_s: float = 0.0  # longest step that prefill may cause beside decodes; 0: the knee decides
    weights_grace_s: float = 60.0  # how long a begun request waits for a worker with its weights, if others serve


@dataclass(frozen=True)
class WorkerStats:
    running: int
    blocks_used: int
    blocks_total: int
    plans_outstanding: int
    lead_s: float
    draining: bool
    host_used: int = 0  # host blocks
    host_total: int = 0


@dataclass(frozen=True)
class Stats:
    requests: int  # not ended
    running: int  # sequences
    waiting: int  # requests
    waiting_tokens: int
    tenants: dict[str, tuple[int, int]]  # waiting requests and tokens
    workers: dict[str, WorkerStats]
    counters: Counters  # live object: copy to keep
    classes: dict[str, int] = field(default_factory=dict)  # waiting requests

    def depth(self) -> dict[str, float]:
        """The fields of the `depth` hash that the core knows: what waits, in all and per tenant, and what runs."""
        fields: dict[str, float] = {"requests": self.waiting, "tokens": self.waiting_tokens, "running": self.running}
        for tenant, (requests, tokens) in self.tenants.items():
            fields[f"requests:{tenant}"], fields[f"tokens:{tenant}"] = requests, tokens
        for wid, worker in self.workers.items():
            fields[f"kv_used:{wid}"], fields[f"kv_blocks:{wid}"] = worker.blocks_used, worker.blocks_total
        return fields


class Core:
    def __init__(self, config: CoreConfig | None = None) -> None:
        self.config = config or CoreConfig()
        self._queue = WaitingQueue(self.config.tenant_weights, self.config.aging_s)
        self._lifecycle = Lifecycle(self._queue, self.config.max_model_len, self.config.weights_grace_s)
        self._workers: dict[str, WorkerState] = {}
        self._workers_made = 0
        self._batches = BatchBuilder(self._lifecycle, self._workers, self.config.max_num_batched_tokens is None)
        self._deadlines: list[tuple[float, str]] = []  # heap
        self._checked = False  # nothing has changed since check_integrity

    # ----------------------------------------------------- the interface

    def apply(self, event: Event, now: float) -> list[Effect]:
        """Apply one event."""
        self._lifecycle.now = now
        self._checked = False
        match event:
            case events.StepDone():
                self._step_done(event)
            case events.Arrive():
                self._arrive(event)
            case events.Cancel():
                self._end_request(event.rid, event.reason)
            case events.ChoiceEnded():
                self._choice_ended(event)
            case events.Resynced():
                self._resynced(event)
            case events.WorkerServing():
                self._worker_serving(event)
            case events.WorkerDraining():
                self._worker_draining(event)
            case events.WorkerLost():
                self._worker_lost(event)
            case events.ServedElsewhere():
                self._queue.charge_elsewhere(event.tokens, event.most)
        return self._take_effects()

    def plan(self, now: float) -> list[Effect]:
        """End requests past their deadline, then plan for every worker that needs more work."""
        self._lifecycle.now = now
        while self._deadlines and self._deadlines[0][0] <= now:
            self._end_request(heapq.heappop(self._deadlines)[1], "deadline")
        self._lifecycle.give_up_stranded()
        self._queue.age(now)
        progress = True
        while progress:  # again, since the plan of one worker may assign sequences to another
            progress = False
            for worker in self._workers.values():
                while self._wants_plan(worker, now):
                    plan = self._batches.build(worker)
                    if plan is None:
                        break
                    self._lifecycle.effects.append(events.SendPlan(worker.wid, plan))
                    progress = True
        effects = self._take_effects()
        self._checked &= not effects
        return effects

    def next_wake(self, now: float) -> float | None:
        """When `plan` has something to do although no event came: a worker runs out of planned work, a deadline passes.
        Ageing needs no wake: it changes who is next, and room for the next comes with an event."""
        dues = [until for until in self._lifecycle.parked.values() if until is not None]
        wake = min([*dues, *(due for due, _ in self._deadlines[:1])], default=None)
        for worker in self._workers.values():
            if len(worker.in_flight) >= self._depth(worker) or (worker.quarantined is not None and worker.in_flight):
                continue
            wait = worker.remaining_s(now) - worker.step_time.lead_s
            if worker.running or (wait > 0 and (worker.assigned or self._queue.sequences)):
                due = now + max(wait, 0.0)
                wake = due if wake is None else min(wake, due)
        return wake

    def rids_in_flight(self, wid: str) -> list[str]:
        """rids in plans that ``wid`` has not reported on: those whose `attempts` its death raises."""
        worker = self._workers.get(wid)
        if worker is None:
            return []
        seats = {seat for batch in worker.in_flight for seat in batch.row_seats()}
        seated = [worker.seats[seat] for seat in seats]
        return list(dict.fromkeys(sequence.request.rid for sequence in seated if sequence is not None))

    def sequences_on(self, wid: str) -> list[tuple[str, int]]:
        """(rid, choice) of all that ``wid`` may still report on: whose journals have to be read when it is lost."""
        worker = self._workers.get(wid)
        return [(sequence.request.rid, sequence.choice) for sequence in worker.seated()] if worker else []

    def stats(self) -> Stats:
        """Figures for metrics and `depth`; cheap."""
        waiting = self._queue.waiting
        return Stats(
            requests=len(self._lifecycle.requests),
            running=sum(worker.running for worker in self._workers.values()),
            waiting=sum(requests for requests, _ in waiting.values()),
            waiting_tokens=sum(tokens for _, tokens in waiting.values()),
            tenants={tenant: (requests, tokens) for tenant, (requests, tokens) in waiting.items()},
            workers={
                worker.wid: WorkerStats(
                    running=worker.running,
                    blocks_used=worker.blocks.total - worker.blocks.free,
                    blocks_total=worker.blocks.total,
                    plans_outstanding=len(worker.in_flight),
                    lead_s=worker.step_time.lead_s,
                    draining=worker.draining,
                    host_used=worker.blocks.host.used if worker.blocks.host is not None else 0,
                    host_total=worker.blocks.host.total if worker.blocks.host is not None else 0,
                )
                for worker in self._workers.values()
            },
            counters=self._lifecycle.counters,
            classes=dict(zip(PRIORITIES, self._queue.classes, strict=True)),
        )

    def take_charged(self) -> dict[str, float]:
        """Tokens that each tenant was served since this was called last."""
        return self._queue.take_charged()

    def active_tenants(self) -> list[str]:
        """Those that have anything waiting or running."""
        return self._queue.active_tenants()

    def oldest_waiting(self) -> float | None:
        """When the request arrived that has waited longest; None if none waits."""
        return self._queue.oldest()

    def check_integrity(self) -> None:
        """Assert every invariant that ties requests, queue, workers and blocks together. For tests and idle moments:
        milliseconds where pools are large, so what has not changed since is not checked again."""
        if self._checked:
            return
        self._queue.check_integrity()
        held = {}
        for worker in self._workers.values():
            worker.check_integrity()
            held.update(dict.fromkeys([*worker.seated(), *worker.assigned], worker))
            if worker.quarantined is not None:
                held[worker.quarantined] = worker
        assert held == self._lifecycle.worker_of, "a sequence is filed under another worker than holds it"
        queued = {id(sequence) for sequence in self._queue}
        for request in self._lifecycle.requests.values():
            live = [s for s in request.sequences if s.state is not State.ENDED]
            assert len(live) == request.open > 0
            for sequence in live:
                seated = sequence.state in (State.RUNNING, State.LEAVING, State.ENDING)
                assert seated == (sequence.seat >= 0)
                assert (sequence.state is State.RUNNING) == bool(sequence.blocks)
                if sequence.state is State.WAITING and sequence not in self._lifecycle.worker_of:
                    assert (id(sequence) in queued) != (sequence in self._lifecycle.parked)
                else:
                    assert id(sequence) not in queued
        open_sequences = sum(request.open for request in self._lifecycle.requests.values())
        placed = sum(len(worker.seated()) + len(worker.assigned) for worker in self._workers.values())
        assert placed + len(queued) + len(self._lifecycle.parked) <= open_sequences
        self._checked = True

    # ----------------------------------------------------- requests

    def _arrive(self, event: events.Arrive) -> None:
        if event.rid in self._lifecycle.requests:
            return
        request = Request(event, PRIORITIES.index(event.priority))
        self._lifecycle.admit(request, event.choices or [ChoiceState()] * len(request.sequences))
        if event.deadline is not None and request.open:
            heapq.heappush(self._deadlines, (event.deadline, event.rid))

    def _end_request(self, rid: str, reason: str) -> None:
        request = self._lifecycle.requests.get(rid)
        for sequence in request.sequences if request else ():
            self._lifecycle.cancel(sequence, reason)

    def _sequence(self, rid: str, choice: int) -> Sequence | None:
        request = self._lifecycle.requests.get(rid)
        return request.sequences[choice] if request else None

    def _choice_ended(self, event: events.ChoiceEnded) -> None:
        sequence = self._sequence(event.rid, event.choice)
        if sequence is None:
            return
        if sequence.state is State.FINISHING:
            assert sequence.final is not None
            self._lifecycle.ended(sequence, sequence.final.reason)
        elif sequence.state is State.RESYNCING:  # nothing was left to read
            self._lifecycle.ended(sequence, sequence.end_reason or "abort")

    def _resynced(self, event: events.Resynced) -> None:
        sequence = self._sequence(event.rid, event.choice)
        if sequence is None or sequence.state not in (State.RESYNCING, State.FINISHING):
            return
        sequence.adopt(event.state)
        if event.state.finish is not None:
            self._lifecycle.ended(sequence, event.state.finish)
        elif sequence.state is State.FINISHING:
            self._lifecycle.finish_again(sequence)
        else:
            self._lifecycle.place_again(sequence)

    # ----------------------------------------------------- workers

    def _worker_serving(self, event: events.WorkerServing) -> None:
        worker = self._workers.get(event.wid)
        if worker is not None and worker.gen == event.gen:
            worker.draining = worker.released = False
            return
        if worker is not None:
            self._worker_lost(events.WorkerLost(event.wid, worker.gen))
        if not self._workers:
            self._lifecycle.served_at = self._lifecycle.now
        config = self.config
        self._workers_made += 1
        self._workers[event.wid] = worker = WorkerState(
            event.wid,
            event.gen,
            event.capacity,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            self._workers_made,
            config.inter_token_target_s,
        )
        known = (
            self._lifecycle.limit if self._workers_made > 1 else None
        )  # the worker's limit replaces the configured one
        self._lifecycle.limit = max(known or 0, worker.limit)
        for sequence in list(self._lifecycle.parked):
            self._lifecycle.requeue(sequence)
        for sequence in list(self._queue):
            self._lifecycle.check_length(sequence)
        for other in self._workers.values():
            if other.draining:
                self._move_off(other)

    def _worker_draining(self, event: events.WorkerDraining) -> None:
        worker = self._workers.get(event.wid)
        if worker is None or worker.gen != event.gen:
            return
        worker.draining = True
        self._unassign(worker)
        self._move_off(worker)

    def _move_off(self, worker: WorkerState) -> None:
        """Preempt every running sequence that another serving worker can hold."""
        serving = [other for other in self._workers.values() if not other.draining]
        for sequence in worker.seated():
            if sequence.state is State.RUNNING and any(other.fits(sequence) for other in serving):
                self._lifecycle.leave(sequence)

    def _unassign(self, worker: WorkerState) -> None:
        for sequence in [*worker.assigned, worker.quarantined]:
            if sequence is not None and sequence.state is State.WAITING:
                self._lifecycle.requeue(sequence)

    def _worker_lost(self, event: events.WorkerLost) -> None:
        worker = self._workers.get(event.wid)
        if worker is None or worker.gen != event.gen:
            return
        suspects = self.rids_in_flight(event.wid) if event.died else []
        culprit = (
            next((batch.quarantined for batch in worker.in_flight if batch.quarantined), None) if event.died else None
        )
        for rid in suspects:
            self._lifecycle.requests[rid].attempts += 1
        self._unassign(worker)
        for sequence in worker.seated():
            if sequence is culprit:
                sequence.error = EngineFailed("the worker died on this request alone, after two deaths with others")
                sequence.dead = True
            self._worker_gone(sequence, event.journals.get((sequence.request.rid, sequence.choice)))
        del self._workers[event.wid]

    def _worker_gone(self, sequence: Sequence, state: ChoiceState | None) -> None:
        """Its worker is lost: continue from the end of its journal."""
        if sequence.state is not State.LEAVING:
            sequence.move(State.LEAVING)
        worker = self._lifecycle.worker_of[sequence]
        if worker.quarantined is sequence:
            worker.quarantined = None
        sequence.blocks = []
        self._lifecycle.unseat(sequence)
        if state is None:
            sequence.lost_track = True
        else:
            sequence.adopt(state)
            if state.finish is not None:
                self._lifecycle.ended(sequence, state.finish)
                return
        self._lifecycle.place_again(sequence)

    # ----------------------------------------------------- hints

    def _step_done(self, event: events.StepDone) -> None:
        worker = self._workers.get(event.wid)
        if worker is None or worker.gen != event.gen or not worker.hinted < event.step <= worker.step:
            return  # a repeat, or of another session
        done = []
        while worker.in_flight and worker.in_flight[0].step <= event.step:
            done.append(worker.in_flight.popleft())
        self._learn_step_time(worker, done, event)
        worker.hinted = event.step
        worker.last_hint = self._lifecycle.now
        for batch in done:
            self._note_first_tokens(worker, batch)
        tokens = self._read_rows(worker, event)
        if event.dropped or event.spoiled:
            self._drop(worker, event)
        self._lifecycle.counters.output_tokens += tokens
        if tokens != sum(batch.sampling_rows for batch in done):
            self._find_missing(worker, done, event)
        for batch in done:
            worker.free_seats.extend(batch.vacated)
        for sequence in [s for s in worker.departing if s.last_step <= event.step]:
            self._lifecycle.settle(sequence)

    def _read_rows(self, worker: WorkerState, event: events.StepDone) -> int:
        """Append the journaled tokens; returns their number. The one loop over all sequences of a step."""
        seats, size = worker.seats, 0
        refused = self._read_verdicts(worker, event) if event.verdicts else ()
        for row in event.rows:
            sequence = seats[row.seat]
            if sequence is None or row.seat in refused:
                continue
            raw = row.tokens
            size += len(raw)
            append_ids(sequence.output, raw)
            sequence.cursor = row.cursor
            if row.finish is not None:
                self._lifecycle.ended(sequence, row.finish)
        return size // ID_BYTES

    def _drop(self, worker: WorkerState, event: events.StepDone) -> None:
        """After the rows, since an end that they tell publishes blocks. Those that shared a spoiled block are told as
        dropped too, in this hint or in that of their first step: the worker knows what it has not written."""
        for seat in event.dropped:
            sequence = worker.seats[seat] if 0 <= seat < len(worker.seats) else None
            if sequence is not None:
                self._lifecycle.drop(sequence)
        worker.blocks.forget(unpack_ids(event.spoiled))

    def _read_verdicts(self, worker: WorkerState, event: events.StepDone) -> set[int]:
        """Seats of which a row did not land: closed elsewhere, or of a placement that is not the journal's."""
        refused = set()
        for row, verdict in zip(event.rows, event.verdicts, strict=True):
            sequence = worker.seats[row.seat]
            if verdict == LANDED or sequence is None:
                continue
            refused.add(row.seat)
            if verdict == CLOSED:
                self._lifecycle.ended(sequence, row.finish or "closed")
            else:
                self._lifecycle.leave(sequence, lost_track=True)
        return refused

    def _find_missing(self, worker: WorkerState, done: list[InFlightBatch], event: events.StepDone) -> None:
        """Fewer tokens came than were planned. Expected for an ended sequence; a live one has a gap."""
        missing = Counter(seat for batch in done for seat in batch.sampled_seats())
        missing.subtract({row.seat: len(row.tokens) // ID_BYTES for row in event.rows})
        for seat, count in missing.items():
            sequence = worker.seats[seat]
            if count and sequence is not None:
                self._lifecycle.leave(sequence, lost_track=True)

    def _note_first_tokens(self, worker: WorkerState, batch: InFlightBatch) -> None:
        for sequence in batch.first:
            if sequence.request.first_token is None:
                sequence.request.first_token = self._lifecycle.now
            if sequence is batch.quarantined and sequence is worker.quarantined:
                sequence.cleared = sequence.request.attempts
                worker.quarantined = None

    def _learn_step_time(self, worker: WorkerState, done: list[InFlightBatch], event: events.StepDone) -> None:
        step_time = worker.step_time
        expected = sum(batch.expected_s for batch in done)
        exec_s, idle_s = event.exec_us / 1e6, event.idle_us / 1e6
        for batch in done:
            share = batch.expected_s / expected if expected else 1 / len(done)
            step_time.learn(batch.decode_rows, batch.prefill_tokens, exec_s * share)
        first = done[0]
        if first.to_idle and len(done) == 1:
            step_time.measured_way(self._lifecycle.now - first.sent - exec_s)
        elif idle_s > LATE_S and not first.excused and len(worker.in_flight) + len(done) < self.config.plans_ahead:
            step_time.was_late(idle_s)
        else:
            step_time.was_in_time()

    # ----------------------------------------------------- when to plan

    def _depth(self, worker: WorkerState) -> int:
        """Most plans outstanding: two until their duration is known: one runs and one waits. Further ones run in the
        later stages of a pipeline."""
        if worker.in_flight and not worker.in_flight[-1].expected_s:
            return min(2, self.config.plans_ahead) + worker.stages - 1
        return self.config.plans_ahead + worker.stages - 1

    def _wants_plan(self, worker: WorkerState, now: float) -> bool:
        if worker.has_notices:
            return True
        if worker.quarantined is not None and worker.in_flight:
            return False
        return len(worker.in_flight) < self._depth(worker) and worker.remaining_s(now) <= worker.step_time.lead_s

    def _take_effects(self) -> list[Effect]:
        for worker in self._workers.values():
            if worker.draining and not worker.released and not worker.in_flight and worker.is_empty():
                worker.released = True
                self._lifecycle.effects.append(events.ReleaseWorker(worker.wid, worker.gen))
        effects, self._lifecycle.effects = self._lifecycle.effects, []
        return effects
