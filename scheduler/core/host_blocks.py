"""HostBlocks: which prefixes lie in the host memory beside one worker's KV pool, and the copies that a plan names.

A block that is evicted from the pool's prefix cache is copied out; a prompt that begins with it has it copied in. What
was copied in stays here too, so that its next eviction costs nothing. Host blocks are reused least recently used first,
but never twice in one plan: its copies out are made before its copies in, in no order among themselves.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

from protocol.messages import pack_ids


class HostBlocks:
    """Host blocks 0..total-1 of one worker's one generation."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.version = 0  # grows whenever a prefix is lost here
        self._held: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._free = deque(range(total))
        self._busy: set[int] = set()  # host blocks that the plan being made names
        self._out: list[int] = []  # block, host block, ...
        self._into: dict[int, int] = {}  # block -> host block

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._held

    @property
    def used(self) -> int:
        return len(self._held)

    def save(self, block: int, digest: bytes) -> bool:
        """Have ``block``, which holds the prefix ``digest``, copied out. False: there is no room in this plan."""
        if digest in self._held:
            self._held.move_to_end(digest)
            return True
        host = self._room()
        if host is None:
            return False
        self._held[digest] = host
        self._busy.add(host)
        self._out += (block, host)
        return True

    def hold(self, digests: Iterable[bytes]) -> list[int]:
        """The host blocks of ``digests``, which are all here and stay until the plan is sent."""
        found = []
        for digest in digests:
            self._held.move_to_end(digest)
            found.append(self._held[digest])
        self._busy.update(found)
        return found

    def load(self, host: int, block: int) -> None:
        """Have the held ``host`` block copied to ``block``."""
        self._into[block] = host

    def coming(self, blocks: Iterable[int]) -> list[int]:
        """Those of ``blocks`` that the plan being made has copied in."""
        return [block for block in blocks if block in self._into]

    def forget(self, digest: bytes) -> None:
        """What is held as ``digest`` may not be it."""
        if (host := self._held.pop(digest, None)) is not None:
            self._free.append(host)
            self.version += 1

    def take_copies(self) -> tuple[bytes, bytes]:
        """Plan.copies_out and Plan.copies_in of the plan that is now sent."""
        if not self._busy:
            return b"", b""
        into = [number for block, host in self._into.items() for number in (host, block)]
        copies = pack_ids(self._out), pack_ids(into)
        self._out, self._into = [], {}
        self._busy.clear()
        return copies

    def _room(self) -> int | None:
        """A host block that this plan has not named: a free one, else that of the least recently used prefix."""
        for _ in range(len(self._free)):
            if (host := self._free.popleft()) not in self._busy:
                return host
            self._free.append(host)
        oldest = next(iter(self._held), None)
        if oldest is None or self._held[oldest] in self._busy:
            return None
        self.version += 1
        return self._held.pop(oldest)

    def check_integrity(self) -> None:
        """Free + held = total, and no host block is two prefixes'."""
        assert sorted([*self._free, *self._held.values()]) == list(range(self.total)), "free + held != total"
        targets = self._out[1::2]
        assert len(set(targets)) == len(targets), "two copies out to one host block"
        assert self._busy.issuperset([*targets, *self._into.values()]), "a copy may lose its host block"
