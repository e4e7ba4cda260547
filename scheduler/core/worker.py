"""WorkerState: one worker as the core sees it: seats, blocks, sequences, and its plans that are not hinted yet.

In the steady state all of its sequences are in a decode set (decode_set.py). A worker that is a pipeline of several
stages has as many of these, which take turns: so a step needs no token of the one before it, and all stages are busy.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field

from protocol.messages import Capacity, unpack_seats
from scheduler.core.blocks import BlockManager
from scheduler.core.decode_set import DecodeSet
from scheduler.core.host_blocks import HostBlocks
from scheduler.core.sequence import Sequence
from scheduler.core.step_time import StepTimeModel

MOST_SEATS = 1 << 16  # uint16 on the wire
NEVER = 1 << 62
LEAST_STEP_S = 1e-4  # what a plan counts for at least, in the work that copies are made beside


@dataclass(slots=True)
class InFlightBatch:
    """A plan that was sent and not hinted yet."""

    step: int
    sent: float
    seats: bytes
    samples: bytes  # empty: every row samples
    sampling_rows: int
    decode_rows: int
    prefill_tokens: int
    expected_s: float
    to_idle: bool  # nothing else was outstanding when it was sent
    excused: bool  # nothing could be planned before, so a wait of the device is not lateness
    vacated: list[int] = field(default_factory=list)  # seats that are empty from this step on
    first: list[Sequence] = field(default_factory=list)  # for which it samples the first token of this placement
    quarantined: Sequence | None = None

    def row_seats(self) -> array[int]:
        return unpack_seats(self.seats)

    def sampled_seats(self) -> list[int]:
        seats = unpack_seats(self.seats)
        return [seat for k, seat in enumerate(seats) if not self.samples or self.samples[k]]


class WorkerState:
    def __init__(
        self,
        wid: str,
        gen: int,
        capacity: Capacity,
        most_seqs: int | None,
        most_tokens: int | None,
        order: int,
        target_s: float = 0.0,
    ) -> None:
        pool = capacity.pools[0]
        self.wid = wid
        self.gen = gen
        self.order = order
        self.capacity = capacity
        self.block_size = pool.unit_tokens
        host = next((other for other in capacity.pools[1:] if other.kind == "host"), None)
        self.blocks = BlockManager(pool.units, pool.unit_tokens, None if host is None else HostBlocks(host.units))
        self._copy_s = 0.0 if host is None else host.copy_us / 1e6
        self._copied_at = 0.0  # planned work beside which all copies in that are named so far will have been made
        self._coming: set[int] = set()  # blocks that may not be copied in yet
        self.planned_s = 0.0  # expected time of all plans sent
        self.level = capacity.level
        self.fingerprint = capacity.fingerprint
        self.limit = min(capacity.max_model_len, pool.units * pool.unit_tokens)  # tokens of one sequence, in all
        self.budget = min(capacity.max_num_batched_tokens, most_tokens or NEVER)
        self.most_seqs = min(capacity.max_num_seqs, most_seqs or NEVER, self.budget)
        self.step_time = StepTimeModel(capacity.step_us, self.budget, target_s)

        seats = min(2 * capacity.max_num_seqs, MOST_SEATS)
        self.seats: list[Sequence | None] = [None] * seats
        self.free_seats = list(range(seats - 1, -1, -1))
        self.stages = max(1, capacity.stages)
        self.groups = [DecodeSet(self.block_size) for _ in range(self.stages)]  # one after another has its step
        self.turn = 0  # group of the next plan
        self.prefilling: list[Sequence] = []
        self.departing: dict[Sequence, None] = {}  # seated, without rows to come: leaving, ending, or all planned
        self.assigned: deque[Sequence] = deque()  # sequences from the head of the queue that will start here
        self.quarantined: Sequence | None = None  # runs alone until its first token

        self.frees: list[int] = []  # for the next plan
        self.ends: list[tuple[int, str]] = []  # for the next plan
        self.in_flight: deque[InFlightBatch] = deque()
        self.step = 0  # last planned
        self.hinted = 0
        self.last_hint = 0.0
        self.had_nothing = True  # when last asked for a plan
        self.draining = False
        self.released = False

    def expect_copies(self, sequence: Sequence, hits: int) -> None:
        """``sequence`` starts in the plan being made with ``hits`` blocks that it does not compute: note when those
        that are copied in will be there. A row before that would make the whole step wait."""
        sequence.ready_s = 0.0
        host, shared = self.blocks.host, sequence.blocks[:hits]
        if host is None:
            return
        if self.planned_s >= self._copied_at:
            self._coming.clear()
        if coming := [block for block in host.coming(shared) if block not in self._coming]:
            self._copied_at = max(self._copied_at, self.planned_s) + len(coming) * self._copy_s
            self._coming.update(coming)
        if not self._coming.isdisjoint(shared):
            sequence.ready_s = self._copied_at

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether the blocks that ``sequence`` starts with will be there by the time of the next plan."""
        return sequence.ready_s <= self.planned_s

    @property
    def running(self) -> int:
        """Sequences that have rows to come."""
        return sum(map(len, self.groups)) + len(self.prefilling)

    @property
    def decoding(self) -> DecodeSet:
        """The decodes of the next plan."""
        return self.groups[self.turn]

    def running_sequences(self) -> list[Sequence]:
        return [*self._decodes(), *self.prefilling]

    def _decodes(self) -> list[Sequence]:
        return [sequence for group in self.groups for sequence in group.members.values()]

    def take_turn(self) -> None:
        """It is the turn of the next group that has members, if any has."""
        turns = [(self.turn + k) % self.stages for k in range(self.stages)]
        self.turn = next((turn for turn in turns if self.groups[turn].members), self.turn)

    def join(self, sequence: Sequence) -> None:
        """``sequence`` decodes from here on: in the group whose plan is being made, since its token will be known when
        that has its turn again; in the smallest where that one is much smaller, and waits once."""
        smallest = min(self.groups, key=len)
        uneven = len(self.decoding) >= len(smallest) + max(2, len(smallest) // 4)
        (smallest if uneven else self.decoding).join(sequence)

    def part(self, sequence: Sequence) -> bool:
        """It does not decode any more. False if it did not."""
        for group in self.groups:
            if sequence.seat in group.members:
                group.part(sequence)
                return True
        return False

    @property
    def has_notices(self) -> bool:
        """Whether a plan must be sent even without rows: ends are sent at once; emptied seats only when no row is
        left."""
        return bool(self.ends or (self.frees and not self.free_seats))

    def backlog(self) -> int:
        """Prompt tokens that are begun or assigned and not planned."""
        return sum(s.known - s.computed for s in self.prefilling) + sum(s.known_tokens for s in self.assigned)

    def seated(self) -> list[Sequence]:
        """Every sequence that the worker may still report on."""
        return [*self._decodes(), *self.prefilling, *self.departing]

    def remaining_s(self, now: float) -> float:
        """Expected time until the worker's first stage has executed all plans sent: the oldest have gone on."""
        waiting = list(self.in_flight)[self.stages - 1 :]
        if not waiting:
            return 0.0
        head = waiting[0]
        elapsed = now - max(head.sent, self.last_hint)
        return max(0.0, head.expected_s - elapsed) + sum(f.expected_s for f in waiting[1:])

    def fits(self, sequence: Sequence) -> bool:
        """Whether ``sequence`` can run here at all: its context fits, the worker's version can read it, and if its
        request has begun, it has begun with these weights."""
        able = sequence.target <= self.limit and sequence.level <= self.level
        return able and sequence.request.may_run_at(self.fingerprint)

    def is_empty(self) -> bool:
        return not (self.running or self.departing or self.assigned or self.quarantined)

    def check_integrity(self) -> None:
        seated = self.seated()
        assert len({id(s) for s in seated}) == len(seated), "a sequence is in two places"
        self.blocks.check_integrity([s.blocks for s in seated])
        for group in self.groups:
            group.check_integrity()
        for sequence in seated:
            assert self.seats[sequence.seat] is sequence, "an orphan seat"
        held = set(self.free_seats)
        assert len(held) == len(self.free_seats)
        assert not held & {s.seat for s in seated}
        vacating = set(self.frees) | {seat for seat, _ in self.ends} | {s for f in self.in_flight for s in f.vacated}
        assert len(held | vacating | {s.seat for s in seated}) == len(self.seats), "a seat was lost"
        assert self.running <= self.most_seqs
        assert self.step - self.hinted == len(self.in_flight)
