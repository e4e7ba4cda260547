"""Which sequences would read blocks that were never written."""

from __future__ import annotations

from collections.abc import Iterable

from protocol.messages import NewSequence, Plan, pack_ids, unpack_ids
from protocol.sampling import SamplingParams
from workers.spoiled import SpoiledBlocks


def new(seat: int, blocks: Iterable[int], computed: int = 0) -> NewSequence:
    return NewSequence(seat, "r", 0, 1, pack_ids(range(20)), 20, SamplingParams(), 0, 0, pack_ids(blocks), computed)


def plan(*sequences: NewSequence, **fields) -> Plan:
    return Plan(0, 0, 1, new=list(sequences), **fields)


def test_nothing_is_dropped_where_nothing_fails():
    tables = SpoiledBlocks(4)
    assert tables.follow(plan(new(0, [1, 2, 3]), new(1, [1, 2, 4], 8))) is None
    assert tables.follow(plan(frees=[0], ends=[(1, "abort")])) is None


def test_those_that_share_what_was_not_written_are_dropped_and_those_that_read_from_these():
    tables = SpoiledBlocks(4)
    drops = tables.follow(
        plan(new(0, [1, 2]), new(1, [1, 3], 4), new(2, [1, 3, 4], 8), new(3, [5, 6]), new(4, [5, 7], 4)), [0]
    )
    assert drops is not None
    assert drops.others == {1, 2}
    assert list(unpack_ids(drops.blocks)) == [1, 2, 3, 4]


def test_what_fails_by_itself_may_still_have_read_from_another_that_does():
    for order in ([0, 1], [1, 0]):
        tables = SpoiledBlocks(4)
        drops = tables.follow(plan(new(0, [1, 2]), new(1, [1, 3], 4)), order)
        assert drops is not None
        assert drops.others == {1}


def test_those_whose_blocks_the_dropped_one_only_read_go_on_but_nobody_else_is_given_these():
    tables = SpoiledBlocks(4)
    tables.follow(plan(new(0, [1, 2]), new(1, [1, 3], 4)))
    drops = tables.follow(plan(), [1])
    assert drops is not None
    assert drops.others == set()
    assert list(unpack_ids(drops.blocks)) == [1, 3]
    assert tables.follow(plan(new(2, [1, 4], 4))) is None, "block 1 was written"


def test_a_reader_that_arrives_later_is_dropped_until_the_block_is_handed_out_anew():
    tables = SpoiledBlocks(4)
    tables.follow(plan(new(0, [1, 2])), [0])
    drops = tables.follow(plan(new(1, [1, 3], 4)))
    assert drops is not None
    assert drops.others == {1}
    assert tables.follow(plan(new(2, [1, 4]))) is None
    assert tables.follow(plan(new(3, [1, 5], 4))) is None


def test_blocks_appended_later_count_too():
    tables = SpoiledBlocks(4)
    tables.follow(plan(new(0, [1])))
    tables.follow(plan(blocks=[(0, pack_ids([2]))]))
    drops = tables.follow(plan(new(1, [1, 2, 3], 8)), [0])
    assert drops is not None
    assert drops.others == {1}
    tables.follow(plan(new(2, [4]), blocks=[(2, pack_ids([2]))]))
    assert tables.follow(plan(new(3, [4, 2, 5], 8))) is None, "handed out anew by being appended"


def test_what_is_no_table_spoils_nothing():
    tables = SpoiledBlocks(4)
    broken = new(0, [])
    broken.block_table = b"\1\0\0"
    drops = tables.follow(plan(broken), [0, 7])
    assert drops is not None
    assert (drops.others, drops.blocks) == (set(), b"")


def copies(out=(), into=()):
    """Pairs (block, host block) and (host block, block)."""
    return {"copies_out": pack_ids(n for pair in out for n in pair), "copies_in": pack_ids(n for p in into for n in p)}


def test_a_copy_of_a_spoiled_block_is_spoiled_wherever_it_is():
    tables = SpoiledBlocks(4)
    tables.follow(plan(new(0, [1, 2])), [0])
    assert tables.follow(plan(frees=[0], **copies(out=[(1, 7)]))) is None
    assert tables.follow(plan(new(1, [1, 2]))) is None, "written anew"
    drops = tables.follow(plan(new(2, [5, 6], 4), **copies(into=[(7, 5)])))
    assert drops is not None
    assert drops.others == {2}
    assert list(unpack_ids(drops.blocks)) == [5, 6]


def test_a_copy_of_what_is_sound_makes_its_place_sound():
    tables = SpoiledBlocks(4)
    tables.follow(plan(new(0, [1, 2])), [0])
    tables.follow(plan(frees=[0], **copies(out=[(1, 7), (3, 8)])))
    assert tables.follow(plan(new(1, [1, 6], 4), **copies(into=[(8, 1)]))) is None
    tables.follow(plan(**copies(out=[(3, 7)])))
    assert tables.follow(plan(new(2, [2, 6], 4), **copies(into=[(7, 2)]))) is None
