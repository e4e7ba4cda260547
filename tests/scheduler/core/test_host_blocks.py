"""Prefixes on the host: what a plan copies, and when those who begin with them have rows."""

from __future__ import annotations

from protocol.messages import unpack_ids, unpack_pairs
from scheduler.core.blocks import BlockManager
from scheduler.core.events import Cancel
from scheduler.core.host_blocks import HostBlocks
from tests.factories import BLOCK, arrive, core, hint, plans, rows
from tests.scheduler.core.test_blocks import SIZE, filled, hashes


def pairs(copies):
    return [list(unpack_pairs(packed)) for packed in copies]


def make(total=4, host=3):
    return BlockManager(total, SIZE, HostBlocks(host))


def test_what_is_evicted_is_copied_out_and_still_found():
    blocks = make()
    table = filled(blocks, range(8))
    blocks.release(table)
    taken = blocks.start([], 4)
    assert blocks.match(hashes(range(8))) == 2
    out, into = pairs(blocks.take_copies(0))
    assert sorted(block for block, _ in out) == sorted(table)
    assert len({host for _, host in out}) == 2
    assert into == []
    assert pairs(blocks.take_copies(0)) == [[], []], "named once"
    blocks.check_integrity([taken])


def test_a_hit_on_the_host_takes_a_block_and_is_copied_in():
    blocks = make()
    blocks.release(filled(blocks, range(8)))
    taken = blocks.start([], 4)
    [out, _] = pairs(blocks.take_copies(0))
    blocks.release(taken)
    version = blocks.version
    assert not blocks.can_start(hashes(range(8)), 5)
    table = blocks.start(hashes(range(8)), 3)
    assert blocks.version > version
    _, into = pairs(blocks.take_copies(0))
    assert [block for _, block in into] == table[:2]
    assert {host for host, _ in into} == {host for _, host in out}
    blocks.check_integrity([table])
    again = blocks.start(hashes(range(8)), 2)
    assert again == table[:2], "found in the pool from now on"
    assert pairs(blocks.take_copies(0)) == [[], []]


def test_what_is_on_the_host_already_is_evicted_without_a_copy():
    blocks = make()
    blocks.release(filled(blocks, range(8)))
    blocks.release(blocks.start([], 4))
    blocks.take_copies(0)
    blocks.release(blocks.start(hashes(range(8)), 2))
    blocks.take_copies(0)
    blocks.start([], 4)
    assert pairs(blocks.take_copies(0)) == [[], []]
    assert blocks.match(hashes(range(8))) == 2


def test_blocks_are_copied_before_they_are_needed():
    blocks = make()
    table = filled(blocks, range(12))
    blocks.release(table)
    out, _ = pairs(blocks.take_copies(3))
    assert [block for block, _ in out] == [table[2], table[1]], "one is free; of the others those that go first"
    taken = blocks.start([], 2)
    assert taken[1] == table[2]
    assert pairs(blocks.take_copies(0)) == [[], []], "it has been copied"
    blocks.check_integrity([taken])


def test_the_host_forgets_what_was_used_least_recently():
    blocks = make(total=2, host=2)
    for first in (0, 100, 200):
        blocks.release(filled(blocks, range(first, first + 4)))
        blocks.release(filled(blocks, range(first + 50, first + 54)))
        blocks.take_copies(0)
    known = [blocks.match(hashes(range(first, first + 4))) for first in (0, 50, 100, 150, 200, 250)]
    assert known == [0, 0, 1, 1, 1, 1]


def test_a_plan_names_no_host_block_twice_and_what_finds_no_room_is_lost():
    blocks = make(total=3, host=1)
    blocks.release(filled(blocks, range(12)))
    blocks.start([], 3)
    out, _ = pairs(blocks.take_copies(0))
    assert len(out) == 1
    assert sum(digest in blocks.host for digest in hashes(range(12))) == 1


def test_a_hit_keeps_its_host_block_whatever_is_evicted_for_it():
    blocks = make(total=2, host=1)
    blocks.release(filled(blocks, range(4)))
    blocks.release(blocks.start([], 2))
    blocks.take_copies(0)  # 0..3 is on the host alone
    blocks.release(filled(blocks, range(100, 108)))
    table = blocks.start(hashes(range(4)), 2)
    out, into = pairs(blocks.take_copies(0))
    assert out == [], "the one host block is being read"
    assert [block for _, block in into] == table[:1]
    blocks.check_integrity([table])


def test_spoiled_blocks_are_forgotten_on_the_host_too():
    blocks = make()
    table = filled(blocks, range(8))
    blocks.release(table)
    blocks.take_copies(4)
    version = blocks.version
    blocks.forget(table)
    assert blocks.match(hashes(range(8))) == 0
    assert (blocks.host.used, blocks.version > version) == (0, True)
    blocks.check_integrity([])


# ---------------------------------------------------------------- plans


def evicted(copy_us=0.0):
    """A core whose one worker has a prompt of five blocks on the host alone; the prompt, and the last plan's step."""
    made = core(blocks=24, tokens=128, host=40, copy_us=copy_us)
    prompt = range(500, 500 + 5 * BLOCK + 1)
    for rid, ids in (("first", prompt), ("other", range(900, 900 + 24 * BLOCK - 1))):
        made.apply(arrive(rid, ids, max_tokens=1), 0.0)
        [plan] = plans(made.plan(0.0))
        made.apply(hint(plan, finish=dict.fromkeys(rows(plan), "length")), 0.0)
    return made, prompt


def test_a_prompt_that_returns_is_copied_in_by_the_plan_that_starts_it():
    made, prompt = evicted()
    made.apply(arrive("again", prompt, max_tokens=1), 0.0)
    [plan] = plans(made.plan(0.0))
    [new] = plan.new
    into = list(unpack_pairs(plan.copies_in))
    assert new.computed == 5 * BLOCK
    assert [block for _, block in into] == list(unpack_ids(new.block_table))[:5]
    assert rows(plan)[new.seat] == (1, True)
    counters = made.stats().counters
    assert (counters.host_hits, counters.blocks_loaded) == (5 * BLOCK, 5)
    assert counters.blocks_saved >= 5
    worker = made.stats().workers["w0"]
    assert (worker.host_total, worker.host_used) == (40, counters.blocks_saved)
    made.check_integrity()


def begin_decode(made):
    """A request that has rows in all plans from now on."""
    made.apply(arrive("decode", BLOCK, max_tokens=40), 0.0)
    for plan in plans(made.plan(0.0)):
        made.apply(hint(plan), 0.0)


def test_it_has_rows_once_its_blocks_are_there_and_nobody_waits_for_them():
    """Copies take 5 x 1 ms, steps 1 ms (hint)."""
    made, prompt = evicted(copy_us=1000.0)
    begin_decode(made)
    made.apply(arrive("again", prompt, max_tokens=1), 0.0)
    made.apply(arrive("twin", prompt, max_tokens=1), 0.0)
    sent = []
    while not sent or made.stats().running > 1:
        step = plans(made.plan(0.0))
        sent += step
        for plan in step:
            _, *others = rows(plan)
            made.apply(hint(plan, finish=dict.fromkeys(others, "length")), 0.0)
        made.check_integrity()
    assert len(sent[0].new) == 2
    assert len(list(unpack_pairs(sent[0].copies_in))) == 5, "the second one finds the blocks of the first"
    late = [number for number, plan in enumerate(sent) if len(rows(plan)) > 1]
    assert late == [late[0]]
    assert 4 <= late[0] <= 7, "steps of a millisecond go beside copies of five"
    assert len(rows(sent[late[0]])) == 3


def test_alone_it_waits_for_nothing():
    made, prompt = evicted(copy_us=1e6)
    made.apply(arrive("again", prompt, max_tokens=1), 0.0)
    [plan] = plans(made.plan(0.0))
    assert list(rows(plan).values()) == [(1, True)]


def test_what_leaves_before_its_blocks_are_there_leaves_them_behind():
    made, prompt = evicted(copy_us=1e6)
    begin_decode(made)
    made.apply(arrive("again", prompt, max_tokens=1), 0.0)
    sent = plans(made.plan(0.0))
    assert sent[0].new
    assert all(len(rows(plan)) == 1 for plan in sent)
    made.apply(Cancel("again"), 0.0)
    sent += plans(made.plan(0.0))
    for plan in sent:
        made.apply(hint(plan), 0.0)
        made.check_integrity()
    made.apply(arrive("third", prompt, max_tokens=1), 0.0)
    [plan, *_] = plans(made.plan(0.0))
    assert plan.new[0].computed == 5 * BLOCK
    assert plan.copies_in == b""
