"""Lifecycle: every live request, and the one place where a sequence moves from state to state.

Each change of a sequence (start, preemption, move, cancel, loss, end) is one method here, which keeps queue, worker,
seat and blocks consistent and appends the effects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from protocol.errors import ContextLengthExceeded, EngineFailed, RequestError, ServiceError, WeightsChanged
from scheduler.core.events import ChoiceState, Effect, FinishChoice, RequestDone, Resync
from scheduler.core.sequence import Request, Sequence, State
from scheduler.core.waiting import WaitingQueue
from scheduler.core.worker import NEVER, WorkerState

MOST_DROPS = 8  # placements of one sequence that workers give up in a row


@dataclass
class Counters:
    """Running totals since the core began."""

    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up at starts
    prefix_hits: int = 0  # of them found
    host_hits: int = 0  # prompt tokens that were copied from the host
    blocks_saved: int = 0  # copied to the host
    blocks_loaded: int = 0  # copied from there
    prompt_tokens: int = 0  # scheduled as prefill, recomputed ones included
    output_tokens: int = 0  # journaled


class Lifecycle:
    def __init__(self, queue: WaitingQueue, limit: int | None, weights_grace_s: float) -> None:
        self.queue = queue
        self._weights_grace_s = weights_grace_s
        self.limit = limit  # most tokens of one sequence on any worker; None while that is unknown
        self.requests: dict[str, Request] = {}
        # no present worker can run them: they are too long, or began with other weights. When they are given up
        self.parked: dict[Sequence, float | None] = {}
        self.worker_of: dict[Sequence, WorkerState] = {}  # assigned, running, or not yet off its worker
        self.counters = Counters()
        self.effects: list[Effect] = []
        self.now = 0.0
        self.served_at = 0.0  # when the first worker came, after there was none

    # ----------------------------------------------------- in and out of the queue

    def admit(self, request: Request, states: list[ChoiceState]) -> None:
        self.requests[request.rid] = request
        for _ in request.sequences:
            self.queue.enter(request.tenant)
        for sequence, state in zip(request.sequences, states, strict=True):
            if state.finish is not None:
                self.ended(sequence, state.finish)
            else:
                self.queue.push(sequence, self.now)
                self.check_length(sequence)

    def check_length(self, sequence: Sequence) -> None:
        """Resolve max_tokens of a queued sequence; end it if it can never fit, or has all its tokens."""
        if self.limit is None:
            return
        prompt, asked = len(sequence.prompt), sequence.request.sampling.max_tokens
        room = self.limit - prompt
        short = room < (0 if asked == 0 else 1)
        if short or (asked is not None and asked > room):
            self.withdraw(sequence)
            if short:
                error = ContextLengthExceeded(
                    f"the prompt has {prompt} tokens; with one to generate, the limit is {self.limit}", param="prompt"
                )
            else:
                error = ContextLengthExceeded(
                    f"prompt ({prompt} tokens) and max_tokens ({asked}) exceed the context of {self.limit} tokens",
                    param="max_tokens",
                )
            self.fail(sequence, error)
            return
        if sequence.max_tokens is None or (asked is None and sequence.placement == 0):
            sequence.max_tokens = asked if asked is not None else _default_length(sequence.request, room)
            sequence.sampling = msgspec.structs.replace(sequence.request.sampling, max_tokens=sequence.max_tokens)
        if len(sequence.output) >= max(1, sequence.max_tokens):  # where none is asked for, its prompt is still computed
            self.withdraw(sequence)
            self.finish(sequence, "length")

    def withdraw(self, sequence: Sequence) -> None:
        """Remove a waiting sequence from the queue, its worker's assignments, or the parked ones."""
        worker = self.worker_of.pop(sequence, None)
        if worker is not None:
            if worker.quarantined is sequence:
                worker.quarantined = None
            else:
                worker.assigned.remove(sequence)
        elif sequence in self.parked:
            del self.parked[sequence]
        else:
            self.queue.remove(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """Put a waiting sequence that was assigned or parked back in its place."""
        self.withdraw(sequence)
        self.queue.push(sequence, self.now)

    def park(self, sequence: Sequence, serving: Iterable[WorkerState]) -> None:
        """Set a sequence aside that none of the workers ``serving`` can run, until another one comes. Where that is
        for their weights, no more than a grace: a worker that restarts brings the same weights back."""
        other_weights = [worker for worker in serving if not sequence.request.may_run_at(worker.fingerprint)]
        until = None
        if other_weights and len(other_weights) == len(list(serving)):
            sequence.stranded = self.now if sequence.stranded is None else sequence.stranded
            until = sequence.stranded + self._weights_grace_s
        self.parked[sequence] = until

    def give_up_stranded(self) -> None:
        """End what has waited for its weights for longer than the grace."""
        for sequence in [s for s, until in self.parked.items() if until is not None and until <= self.now]:
            self.withdraw(sequence)
            self.fail(
                sequence,
                WeightsChanged(
                    "the model was replaced while this request ran, and no worker is left that has the weights it "
                    "began with; send it again"
                ),
            )

    # ----------------------------------------------------- off a worker

    def leave(self, sequence: Sequence, *, lost_track: bool = False) -> None:
        """No more rows for ``sequence`` on its worker; its blocks are free at once. It continues on
        another worker, or here, once the hint of its last planned step has arrived."""
        sequence.lost_track |= lost_track
        if sequence.state is not State.RUNNING:
            return
        worker = self.worker_of[sequence]
        sequence.move(State.LEAVING)
        self._take_rows(worker, sequence)
        worker.frees.append(sequence.seat)
        sequence.last_step = worker.step
        worker.departing[sequence] = None
        if worker.hinted >= worker.step:
            self.settle(sequence)

    def preempt(self, sequence: Sequence) -> None:
        self.counters.preemptions += 1
        sequence.request.preemptions += 1
        self.leave(sequence)

    def drop(self, sequence: Sequence) -> None:
        """Its worker cannot compute this placement, which is at an end there: its journal is read, and it is placed
        anew. What is given up again and again without a token in between ends with an error."""
        if sequence.known_tokens > sequence.dropped_at:
            sequence.drops, sequence.dropped_at = 0, sequence.known_tokens
        sequence.drops += 1
        if sequence.drops >= MOST_DROPS and sequence.error is None:
            sequence.error = EngineFailed(f"workers gave this sequence up {sequence.drops} times in a row")
        self.leave(sequence, lost_track=True)

    def settle(self, sequence: Sequence) -> None:
        """The last planned step of a departing sequence is hinted: no later hint will mention it."""
        if sequence.state is not State.LEAVING:  # its end should have been reported: a hint was lost
            if sequence.state is State.RUNNING:
                self.leave(sequence, lost_track=True)
                if sequence not in self.worker_of:
                    return
            else:
                sequence.lost_track = True
                sequence.move(State.LEAVING)
        self.unseat(sequence)
        self.place_again(sequence)

    def unseat(self, sequence: Sequence) -> None:
        worker = self.worker_of.pop(sequence)
        worker.departing.pop(sequence, None)
        worker.seats[sequence.seat] = None
        sequence.seat = -1

    def place_again(self, sequence: Sequence) -> None:
        """On no worker and not queued: decide what is next."""
        if sequence.lost_track:
            sequence.move(State.RESYNCING)
            self.effects.append(Resync(sequence.request.rid, sequence.choice))
        elif sequence.error is not None:
            self.fail(sequence, sequence.error)
        elif sequence.end_reason is not None:
            self.finish(sequence, sequence.end_reason)
        else:
            sequence.move(State.WAITING)
            self.queue.push(sequence, self.now)
            self.check_length(sequence)

    def _take_rows(self, worker: WorkerState, sequence: Sequence) -> None:
        """Remove it from the sets that rows are planned from. Free its blocks; computed ones stay in the prefix
        cache."""
        if sequence in worker.departing:
            del worker.departing[sequence]
        elif not worker.part(sequence):
            worker.prefilling.remove(sequence)
        if worker.quarantined is sequence:
            worker.quarantined = None
        if not sequence.lost_track:
            # The last journaled token was input only to a step that has not been hinted: its KV may be missing.
            sure = min(sequence.known_tokens - 1, sequence.computed) // worker.block_size
            for block, digest in zip(sequence.blocks[:sure], sequence.prefix_hashes(worker.block_size), strict=False):
                worker.blocks.publish(block, digest)
        worker.blocks.release(sequence.blocks)
        sequence.blocks = []

    # ----------------------------------------------------- ends

    def cancel(self, sequence: Sequence, reason: str) -> None:
        """End it in any state. If it is leaving a worker, then as soon as it has left."""
        if sequence.state is State.WAITING:
            self.withdraw(sequence)
            self.finish(sequence, reason)
        elif sequence.state is State.RUNNING:
            worker = self.worker_of[sequence]
            sequence.move(State.ENDING)
            self._take_rows(worker, sequence)
            sequence.end_reason = reason
            sequence.last_step = NEVER  # until the plan that carries the end is sent
            worker.ends.append((sequence.seat, reason))
            worker.departing[sequence] = None
        elif sequence.state in (State.LEAVING, State.RESYNCING) and sequence.end_reason is None:
            sequence.end_reason = reason

    def finish(self, sequence: Sequence, reason: str) -> None:
        """No worker runs it: the scheduler writes the terminal frame."""
        sequence.move(State.FINISHING)
        error = sequence.error
        sequence.final = FinishChoice(
            rid=sequence.request.rid,
            choice=sequence.choice,
            placement=sequence.placement,
            cursor=sequence.cursor,
            reason=reason,
            error_code=error.wire_code if error else None,
            error_message=error.message if error else None,
            error_param=error.param if error else None,
            dead=sequence.dead,
        )
        self.effects.append(sequence.final)

    def fail(self, sequence: Sequence, error: RequestError | ServiceError) -> None:
        sequence.error = error
        self.finish(sequence, "error")

    def finish_again(self, sequence: Sequence) -> None:
        """The journal was longer than assumed: the same end, at the true cursor."""
        assert sequence.final is not None
        sequence.final = dataclasses.replace(sequence.final, placement=sequence.placement, cursor=sequence.cursor)
        self.effects.append(sequence.final)

    def ended(self, sequence: Sequence, reason: str) -> None:
        """Its terminal frame is in the journal. Allowed in any state; removes every trace of it."""
        state, worker = sequence.state, self.worker_of.get(sequence)
        if state is State.WAITING and (sequence.entry or worker is not None or sequence in self.parked):
            self.withdraw(sequence)
        elif worker is not None:
            if state is State.RUNNING:
                self._take_rows(worker, sequence)
                worker.frees.append(sequence.seat)
            elif state is State.ENDING and sequence.last_step == NEVER:
                worker.ends.remove((sequence.seat, sequence.end_reason or ""))
                worker.frees.append(sequence.seat)
            self.unseat(sequence)
        sequence.move(State.ENDED)
        sequence.finish_reason = reason
        request = sequence.request
        request.open -= 1
        self.queue.leave(request.tenant)
        if request.open == 0:
            del self.requests[request.rid]
            self.effects.append(self._summary(request))

    def _summary(self, request: Request) -> RequestDone:
        first_planned = self.now if request.first_planned is None else request.first_planned
        first_token = first_planned if request.first_token is None else request.first_token
        queued_s = max(0.0, first_planned - request.arrived)  # arrivals come from another clock
        return RequestDone(
            rid=request.rid,
            tenant=request.tenant,
            prompt_tokens=sum(map(len, request.prompts)),
            output_tokens=sum(len(sequence.output) for sequence in request.sequences),
            cached_tokens=sum(sequence.cached_tokens or 0 for sequence in request.sequences),
            finish_reasons=[sequence.finish_reason or "" for sequence in request.sequences],
            queued_s=queued_s,
            prefill_s=first_token - first_planned,
            decode_s=self.now - first_token,
            preemptions=request.preemptions,
            load_s=min(queued_s, max(0.0, self.served_at - request.arrived)),
        )


def _default_length(request: Request, room: int) -> int:
    """Output tokens of a request that asks for no number: what its model says (at least what the request does ask
    for), cut to what the context leaves."""
    if request.default_max_tokens is None:
        return room
    return min(room, max(request.default_max_tokens, request.sampling.min_tokens))
