"""BlockManager: who owns which block of one worker's KV pool, and which blocks hold a known prefix.

Pure accounting: no tensor, no worker. A block is *owned* by one or more sequences (reference count), or it is
free. A free block that still holds a hashed prefix can be found until it is reused, oldest first.

A hash names the whole prefix up to the block's end, not only the block's own tokens: each hash covers the one
before (a chain), and the first covers the salt. Equal hashes therefore mean equal prefixes within one tenant.
The idea is vLLM's automatic prefix caching; SHA-256 instead of Python's hash, since a collision would show one
request another's context.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from protocol.messages import pack_ids


def chain_hashes(salt: str, tokens: array[int], block_size: int, known: list[bytes]) -> list[bytes]:
    """Extend ``known`` in place to one hash per full block of ``tokens`` and return it."""
    parent = known[-1] if known else hashlib.sha256(salt.encode()).digest()
    for start in range(len(known) * block_size, len(tokens) - block_size + 1, block_size):
        parent = hashlib.sha256(parent + pack_ids(tokens[start : start + block_size])).digest()
        known.append(parent)
    return known


class BlockManager:
    """Blocks 0..total-1 of ``block_size`` tokens each, of one worker's one generation."""

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self._owners = [0] * total  # reference counts
        self._hash_of: list[bytes | None] = [None] * total
        self._by_hash: dict[bytes, int] = {}
        self._plain = list(range(total - 1, -1, -1))  # free, without a cached prefix; a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, still hashed; least recently used first
        self.version = 0  # grows whenever the set of known hashes changes: what `match` found holds until then

    @property
    def free(self) -> int:
        """Blocks that can be handed out, cached ones included."""
        return len(self._plain) + len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def match(self, hashes: Sequence[bytes]) -> int:
        """How many of the leading ``hashes`` are held here."""
        hits = 0
        for digest in hashes:
            if digest not in self._by_hash:
                break
            hits += 1
        return hits

    def can_start(self, hashes: Sequence[bytes], count: int, reserve: int = 0) -> bool:
        """Whether ``start`` with these hits would leave ``reserve`` blocks free."""
        taken = sum(self._owners[self._by_hash[digest]] == 0 for digest in hashes)
        return self.free - taken - (count - len(hashes)) >= reserve

    def owned_once(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` would be free if their one owner left."""
        return sum(self._owners[block] == 1 for block in blocks)

    def start(self, hashes: Sequence[bytes], count: int) -> list[int]:
        """A table of ``count`` blocks whose first ones are the cached blocks of ``hashes`` (all of them hits)."""
        table = [self._by_hash[digest] for digest in hashes]
        for block in table:
            if self._owners[block] == 0:
                del self._cached[block]
            self._owners[block] += 1
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
            del self._by_hash[digest]
            self._hash_of[block] = None
            self.version += 1
        self._owners[block] = 1
        return block

    def publish(self, block: int, digest: bytes) -> None:
        """From now on the owned ``block`` can be found by ``digest``; a no-op if another block has that prefix."""
        if self._hash_of[block] is None and digest not in self._by_hash:
            self._hash_of[block] = digest
            self._by_hash[digest] = block
            self.version += 1

    def forget(self, blocks: Iterable[int]) -> None:
        """The ``blocks`` do not hold what their hashes say: none of them is found any more."""
        for block in blocks:
            if not 0 <= block < self.total or (digest := self._hash_of[block]) is None:
                continue
            del self._by_hash[digest]
            self._hash_of[block] = None
            self.version += 1
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
