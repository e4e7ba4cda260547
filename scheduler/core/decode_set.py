"""DecodeSet: the running decodes of one worker, of which every plan has one row each.

No work is done per member and step. A member's computed tokens are the set's step counter plus a constant; members
are indexed by the step (modulo block size) at which they need their next block, and by the step of their last token;
the packed seats are reused until membership changes.
"""

from __future__ import annotations

from protocol.messages import pack_seats
from scheduler.core.sequence import Sequence


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
        if last in self._last:  # absent if finished() is removing it
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
