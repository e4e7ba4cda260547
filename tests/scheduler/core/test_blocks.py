from __future__ import annotations

from array import array

import pytest

from scheduler.core.blocks import BlockManager, chain_hashes

SIZE = 4


def hashes(tokens: range | list[int], salt: str = "t") -> list[bytes]:
    return chain_hashes(salt, array("i", tokens), SIZE, [])


def filled(blocks: BlockManager, tokens: range) -> list[int]:
    """A table for ``tokens``, all full blocks of it published."""
    table = blocks.start([], blocks.blocks_for(len(tokens)))
    for block, digest in zip(table, hashes(tokens), strict=False):
        blocks.publish(block, digest)
    return table


def test_a_hash_names_the_whole_prefix_and_the_salt():
    a, b = hashes(range(12)), hashes([*range(8), 99, 9, 10, 11])
    assert len(a) == 3
    assert a[:2] == b[:2]
    assert a[2] != b[2]
    assert hashes([99, *range(1, 12)])[1] != a[1], "equal tokens after another prefix"
    assert hashes(range(12), salt="other")[0] != a[0]
    assert hashes(range(11)) == a[:2], "only full blocks"


def test_hashes_are_extended_in_place():
    known = hashes(range(8))
    assert chain_hashes("t", array("i", range(16)), SIZE, known) is known
    assert known == hashes(range(16))


def test_blocks_are_shared_and_free_only_when_the_last_owner_left():
    blocks = BlockManager(8, SIZE)
    first = filled(blocks, range(10))
    hits = hashes(range(8))
    assert blocks.match(hashes(range(12))) == 2
    second = blocks.start(hits, 3)
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert blocks.free == 4
    blocks.check_integrity([first, second])
    blocks.release(first)
    assert blocks.free == 5
    blocks.release(second)
    assert blocks.free == 8
    blocks.check_integrity([])


def test_freed_blocks_stay_findable_until_they_are_handed_out_oldest_first():
    blocks = BlockManager(4, SIZE)
    blocks.release(filled(blocks, range(8)))
    blocks.release(filled(blocks, range(100, 108)))
    assert blocks.match(hashes(range(8))) == 2
    blocks.take()
    assert blocks.match(hashes(range(8))) == 1, "of a prefix the later block goes first"
    blocks.take()
    assert blocks.match(hashes(range(8))) == 0
    assert blocks.match(hashes(range(100, 108))) == 2


def test_plain_blocks_are_handed_out_before_cached_ones():
    blocks = BlockManager(4, SIZE)
    blocks.release(filled(blocks, range(8)))
    blocks.take()
    blocks.take()
    assert blocks.match(hashes(range(8))) == 2


def test_hits_count_as_taken_where_nobody_owns_them():
    blocks = BlockManager(4, SIZE)
    blocks.release(filled(blocks, range(8)))
    hits = hashes(range(8))
    assert blocks.can_start(hits, 4)
    assert not blocks.can_start(hits, 5)
    assert not blocks.can_start(hits, 4, reserve=1)


def test_the_first_block_of_a_prefix_keeps_the_name():
    blocks = BlockManager(4, SIZE)
    first, second = filled(blocks, range(4)), filled(blocks, range(4))
    assert blocks.start(hashes(range(4)), 1) == first
    blocks.release(second)
    blocks.check_integrity([first, first])


def test_integrity_notices_a_lost_block():
    blocks = BlockManager(4, SIZE)
    table = blocks.start([], 2)
    with pytest.raises(AssertionError):
        blocks.check_integrity([table[:1]])


def test_blocks_that_are_forgotten_are_found_by_nobody_and_handed_out_again():
    pool = BlockManager(4, 4)
    names = hashes(range(8))
    held = pool.start([], 2)
    for block, digest in zip(held, names, strict=True):
        pool.publish(block, digest)
    pool.release(held[1:])
    version = pool.version
    pool.forget([*held, 3, -1, 99])
    assert (pool.match(names), pool.free) == (0, 3)
    assert pool.version > version, "what waiting sequences found here holds no more"
    pool.check_integrity([held[:1]])
    pool.publish(held[0], names[0])
    assert pool.match(names) == 1
