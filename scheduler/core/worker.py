"""Lane: one worker as the core sees it: seats, blocks, sequences, and the plans it has not reported on yet.

The steady state is the decode set: members of which every plan has one row each. Nothing is done per member and
step. A member's computed tokens are the set's step counter plus a constant; members are filed by the phase in which
they need their next block, and by the step at which they reach their last token; the packed seats are reused
until membership changes.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from protocol.messages import Capacity
from scheduler.core.blocks import BlockManager
from scheduler.core.sequence import Sequence
from scheduler.core.step_time import Pace

MOST_SEATS = 1 << 16  # uint16 on the wire
NEVER = 1 << 62


class DecodeSet:
    def __init__(self, block_size: int) -> None:
        self.members: dict[int, Sequence] = {}  # by seat, in order of joining
        self.tenants: dict[str, int] = {}
        self.steps = 0
        self._offset: dict[int, int] = {}  # seat -> computed tokens less steps
        self._phases: list[dict[int, Sequence]] = [{} for _ in range(block_size)]
        self._last: dict[int, dict[int, Sequence]] = {}  # step count -> members whose last row it is
        self._packed: bytes | None = None

    def __len__(self) -> int:
        return len(self.members)

    def join(self, sequence: Sequence) -> None:
        """``sequence`` has one known token that is not computed, and needs more than that one row's."""
        seat = sequence.seat
        offset = sequence.computed - self.steps
        self.members[seat] = sequence
        self._offset[seat] = offset
        self._phases[-offset % len(self._phases)][seat] = sequence
        self._last.setdefault(sequence.target - 2 - offset, {})[seat] = sequence
        tenant = sequence.request.tenant
        self.tenants[tenant] = self.tenants.get(tenant, 0) + 1
        self._packed = None

    def part(self, sequence: Sequence) -> None:
        """Take a member out; its ``computed`` is set anew."""
        seat = sequence.seat
        offset = self._offset.pop(seat)
        sequence.computed = self.steps + offset
        sequence.known = sequence.computed + 1
        del self.members[seat]
        del self._phases[-offset % len(self._phases)][seat]
        last = sequence.target - 2 - offset
        if last in self._last:  # popped already where finished() is parting it
            del self._last[last][seat]
            if not self._last[last]:
                del self._last[last]
        tenant = sequence.request.tenant
        self.tenants[tenant] -= 1
        if not self.tenants[tenant]:
            del self.tenants[tenant]
        self._packed = None

    def needing_block(self) -> list[Sequence]:
        """Members whose next row begins a block."""
        return list(self._phases[self.steps % len(self._phases)].values())

    def packed_seats(self) -> bytes:
        if self._packed is None:
            self._packed = pack_seats(self.members)
        return self._packed

    def advance(self) -> list[Sequence]:
        """One row each was planned. Returns those that it was the last row of, parted."""
        done = self._last.pop(self.steps, None)
        self.steps += 1
        if not done:
            return []
        finished = list(done.values())
        for sequence in finished:
            self.part(sequence)
        return finished

    def check_integrity(self) -> None:
        size = len(self._phases)
        assert set(self.members) == set(self._offset)
        for seat, sequence in self.members.items():
            computed = self.steps + self._offset[seat]
            assert sequence.seat == seat
            assert len(sequence.blocks) == -(-computed // size), "a member's table does not cover its tokens"
            assert computed + 1 < sequence.target, "a member has no row to come"
            assert seat in self._phases[-self._offset[seat] % size]
        assert sum(map(len, self._phases)) == sum(map(len, self._last.values())) == len(self.members)
        assert all(last >= self.steps for last in self._last)
        assert sum(self.tenants.values()) == len(self.members)


def pack_seats(seats: Iterator[int] | dict[int, Sequence] | list[int]) -> bytes:
    packed = array("H", seats)
    if array("H", [1]).tobytes()[0] == 0:  # big-endian host
        packed.byteswap()
    return packed.tobytes()


def unpack_seats(raw: bytes) -> array[int]:
    seats = array("H")
    seats.frombytes(raw)
    if array("H", [1]).tobytes()[0] == 0:
        seats.byteswap()
    return seats


@dataclass(slots=True)
class Flight:
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
    excused: bool  # there was nothing to plan before: if the device waited, not for us
    vacated: list[int] = field(default_factory=list)  # seats that are empty from this step on
    first: list[Sequence] = field(default_factory=list)  # whose first token of this stay it samples
    alone: Sequence | None = None

    def row_seats(self) -> array[int]:
        return unpack_seats(self.seats)

    def sampled_seats(self) -> list[int]:
        seats = unpack_seats(self.seats)
        return [seat for k, seat in enumerate(seats) if not self.samples or self.samples[k]]


class Lane:
    def __init__(
        self, wid: str, gen: int, capacity: Capacity, most_seqs: int | None, most_tokens: int | None, order: int
    ) -> None:
        pool = capacity.pools[0]
        self.wid = wid
        self.gen = gen
        self.order = order
        self.capacity = capacity
        self.block_size = pool.unit_tokens
        self.blocks = BlockManager(pool.units, pool.unit_tokens)
        self.limit = min(capacity.max_model_len, pool.units * pool.unit_tokens)  # tokens of one sequence, in all
        self.budget = min(capacity.max_num_batched_tokens, most_tokens or NEVER)
        self.most_seqs = min(capacity.max_num_seqs, most_seqs or NEVER, self.budget)
        self.pace = Pace()

        seats = min(2 * capacity.max_num_seqs, MOST_SEATS)
        self.seats: list[Sequence | None] = [None] * seats
        self.free_seats = list(range(seats - 1, -1, -1))
        self.decoding = DecodeSet(self.block_size)
        self.prefilling: list[Sequence] = []
        self.departing: dict[Sequence, None] = {}  # seated, without rows to come: leaving, ending, or all planned
        self.assigned: deque[Sequence] = deque()  # queue heads that will start here
        self.alone: Sequence | None = None  # runs with nothing beside it until its first token

        self.frees: list[int] = []  # for the next plan
        self.ends: list[tuple[int, str]] = []  # for the next plan
        self.flights: deque[Flight] = deque()
        self.step = 0  # last planned
        self.hinted = 0
        self.last_hint = 0.0
        self.had_nothing = True  # when last asked for a plan
        self.draining = False
        self.released = False

    @property
    def running(self) -> int:
        """Sequences that have rows to come."""
        return len(self.decoding) + len(self.prefilling)

    def running_sequences(self) -> list[Sequence]:
        return [*self.decoding.members.values(), *self.prefilling]

    @property
    def has_notices(self) -> bool:
        """Whether a plan must go out even without rows: ends never wait; emptied seats only when none is left."""
        return bool(self.ends or (self.frees and not self.free_seats))

    def backlog(self) -> int:
        """Prompt tokens that are begun or assigned and not planned."""
        return sum(s.known - s.computed for s in self.prefilling) + sum(s.known_tokens for s in self.assigned)

    def seated(self) -> list[Sequence]:
        """Every sequence that the worker may still report on."""
        return [*self.decoding.members.values(), *self.prefilling, *self.departing]

    def remaining_s(self, now: float) -> float:
        """Expected time until the worker has done all that it was sent."""
        if not self.flights:
            return 0.0
        head = self.flights[0]
        elapsed = now - max(head.sent, self.last_hint)
        return max(0.0, head.expected_s - elapsed) + sum(f.expected_s for f in list(self.flights)[1:])

    def is_empty(self) -> bool:
        return not (self.decoding.members or self.prefilling or self.departing or self.assigned or self.alone)

    def check_integrity(self) -> None:
        seated = self.seated()
        assert len({id(s) for s in seated}) == len(seated), "a sequence is in two places"
        self.blocks.check_integrity([s.blocks for s in seated])
        self.decoding.check_integrity()
        for sequence in seated:
            assert sequence.lane is self
            assert self.seats[sequence.seat] is sequence, "an orphan seat"
        held = set(self.free_seats)
        assert len(held) == len(self.free_seats)
        assert not held & {s.seat for s in seated}
        vacating = set(self.frees) | {seat for seat, _ in self.ends} | {s for f in self.flights for s in f.vacated}
        assert len(held | vacating | {s.seat for s in seated}) == len(self.seats), "a seat was lost"
        assert self.running <= self.most_seqs
        assert self.step - self.hinted == len(self.flights)
