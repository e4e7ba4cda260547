"""BlockManager: who owns which block of one worker's KV pool, and which blocks hold a known prefix.

Pure accounting: no tensor, no worker. A block is *owned* by one or more sequences (reference count), or it is
free. A free block that still holds a hashed prefix can be found until it is reused, oldest first.

A hash names the whole prefix up to the block's end, not only the block's own tokens: each hash covers the one
before (a chain), and the first covers the salt. Equal hashes therefore mean equal prefixes within one tenant.
Where a worker has host memory for it, a prefix that is evicted here is kept there (host_blocks.py) and still found.
The idea is vLLM's automatic prefix caching; SHA-256 instead of Python's hash, since a collision would show one
request another's context.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from protocol.messages import pack_ids
from scheduler.core.host_blocks import HostBlocks


def chain_hashes(salt: str, tokens: array[int], block_size: int, known: list[bytes]) -> list[bytes]:
    """Extend ``known`` in place to one hash per full block of ``tokens`` and return it."""
    parent = known[-1] if known else hashlib.sha256(salt.encode()).digest()
    for start in range(len(known) * block_size, len(tokens) - block_size + 1, block_size):
        parent = hashlib.sha256(parent + pack_ids(tokens[start : start + block_size])).digest()
        known.append(parent)
    return known


class BlockManager:
    """Blocks 0..total-1 of ``block_size`` tokens each, of one worker's one generation; ``host``: those behind them."""

    def __init__(self, total: int, block_size: int, host: HostBlocks | None = None) -> None:
        self.total = total
        self.block_size = block_size
        self.host = host
        self._owners = [0] * total  # reference counts
        self._hash_of: list[bytes | None] = [None] * total
        self._by_hash: dict[bytes, int] = {}
        self._plain = list(range(total - 1, -1, -1))  # free, without a cached prefix; a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, still hashed; least recently used first
        self._version = 0

    @property
    def version(self) -> int:
        """Grows whenever the set of known hashes changes: what `match` found holds until then."""
        return self._version + (self.host.version if self.host is not None else 0)

    @property
    def free(self) -> int:
        """Blocks that can be handed out, cached ones included."""
        return len(self._plain) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading ``hashes`` are held here or on the host."""
        hits, host = 0, self.host
        for digest in hashes:
            if digest not in self._by_hash and (host is None or digest not in host):
                break
            hits += 1
        return hits

    def can_start(self, hashes: Sequence[bytes], count: int, reserve: int = 0) -> bool:
        """Whether ``start`` with these hits would leave ``reserve`` blocks free."""
        held = [block for digest in hashes if (block := self._by_hash.get(digest)) is not None]
        taken = sum(self._owners[block] == 0 for block in held)
        return self.free - taken - (count - len(held)) >= reserve

    def owned_once(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` would be free if their one owner left."""
        return sum(self._owners[block] == 1 for block in blocks)

    def start(self, hashes: Sequence[bytes], count: int) -> list[int]:
        """A table of ``count`` blocks whose first ones are the cached blocks of ``hashes`` (all of them hits). Those
        that are only on the host are copied in by the plan that is being made, and can be found from now on."""
        found = {digest: block for digest in hashes if (block := self._by_hash.get(digest)) is not None}
        for block in found.values():
            if self._owners[block] == 0:
                del self._cached[block]
            self._owners[block] += 1
        if self.host is not None:  # held first: what `take` evicts may need room there
            missing = [digest for digest in hashes if digest not in found]
            for digest, held in zip(missing, self.host.hold(missing), strict=True):
                found[digest] = block = self.take()
                self.host.load(held, block)
                self.publish(block, digest)
        table = [found[digest] for digest in hashes]
        table.extend(self.take() for _ in range(count - len(hashes)))
        return table

    def take(self) -> int:
        """One block, owned once: a plain one if there is one, else the least recently used cached one."""
        if self._plain:
            block = self._plain.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            digest = self._hash_of[block]
            assert digest is not None
            if self.host is not None:
                self.host.save(block, digest)
            del self._by_hash[digest]
            self._hash_of[block] = None
            self._version += 1
        self._owners[block] = 1
        return block

    def take_copies(self, ahead: int) -> tuple[bytes, bytes]:
        """Plan.copies_out and Plan.copies_in of the plan that is now sent.

        The next ``ahead`` blocks to be handed out are copied before they are needed: a step that writes to a block
        waits for the copy that the same plan names, and hardly ever for that of an earlier one.
        """
        if self.host is None:
            return b"", b""
        for block in islice(self._cached, max(0, ahead - len(self._plain))):
            digest = self._hash_of[block]
            assert digest is not None
            if digest not in self.host and not self.host.save(block, digest):
                break
        return self.host.take_copies()

    def publish(self, block: int, digest: bytes) -> None:
        """From now on the owned ``block`` can be found by ``digest``; a no-op if another block has that prefix."""
        if self._hash_of[block] is None and digest not in self._by_hash:
            self._hash_of[block] = digest
            self._by_hash[digest] = block
            self._version += 1

    def forget(self, blocks: Iterable[int]) -> None:
        """The ``blocks`` do not hold what their hashes say: none of them is found any more."""
        for block in blocks:
            if not 0 <= block < self.total or (digest := self._hash_of[block]) is None:
                continue
            if self.host is not None:
                self.host.forget(digest)
            del self._by_hash[digest]
            self._hash_of[block] = None
            self._version += 1
            if self._owners[block] == 0:
                del self._cached[block]
                self._plain.append(block)

    def release(self, table: Iterable[int]) -> None:
        """One owner less for each. Later blocks of a prefix are evicted first, since fewer prompts share them."""
        for block in reversed(list(table)):
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if self._hash_of[block] is None:
                    self._plain.append(block)
                else:
                    self._cached[block] = None

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Free + owned = total, counts match ``tables`` (all that are held), hashes point both ways."""
        counted = [0] * self.total
        for table in tables:
            assert len(set(table)) == len(table), "a table names a block twice"
            for block in table:
                counted[block] += 1
        assert counted == self._owners, "reference counts differ from the tables held"
        free = [*self._plain, *self._cached]
        assert len(free) == len(set(free)) == sum(count == 0 for count in counted), "free + owned != total"
        assert all(counted[block] == 0 for block in free), "a free block is owned"
        assert {b: h for b, h in enumerate(self._hash_of) if h is not None} == {
            b: h for h, b in self._by_hash.items()
        }, "hashes and blocks disagree"
        assert all(self._hash_of[block] is None for block in self._plain), "a plain block is hashed"
        assert all(self._hash_of[block] is not None for block in self._cached), "a cached block is not hashed"
        if self.host is not None:
            self.host.check_integrity()
