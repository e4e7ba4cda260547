"""Placement: which worker a waiting sequence goes to.

A cached prefix is worth the tokens that need not be computed, a loaded worker costs the tokens that go before.
Adding the two makes a long shared prompt stay where it is until that worker is further behind than the prompt is
long; taking the longest prefix first, whatever the load, would send every user of one system prompt to one worker.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.core.sequence import Sequence
from scheduler.core.worker import Lane

DECODE_WEIGHT = 16  # what a running sequence counts for, in prompt tokens: rows that it will still take


def cached_blocks(sequence: Sequence, lane: Lane) -> int:
    """Leading blocks of ``sequence`` that ``lane`` holds; never all of its tokens, since the last must be computed."""
    hashes = sequence.prefix_hashes(lane.block_size)
    return lane.blocks.match(hashes[: (sequence.known_tokens - 1) // lane.block_size])


def blocks_needed(sequence: Sequence, lane: Lane) -> int:
    """A start takes blocks for all known tokens at once: a begun prefill is never stopped for want of one."""
    return lane.blocks.blocks_for(sequence.known_tokens)


def reserve(lane: Lane) -> int:
    """Blocks that a start must leave free while others run, so that it does not preempt what it joins."""
    return max(1, lane.blocks.total // 100) if lane.running else 0


def can_start(sequence: Sequence, lane: Lane) -> bool:
    """Whether ``lane`` has a seat and the blocks for ``sequence`` right now."""
    if lane.draining or sequence.target > lane.limit or not lane.free_seats or lane.running >= lane.most_seqs:
        return False
    hits = sequence.prefix_hashes(lane.block_size)[: cached_blocks(sequence, lane)]
    return lane.blocks.can_start(hits, blocks_needed(sequence, lane), reserve(lane))


def could_start(sequence: Sequence, lane: Lane, without: list[Sequence]) -> bool:
    """Whether ``lane`` surely could start ``sequence`` if those ``without`` left; blocks they share do not count."""
    freed = lane.blocks.owned_once([block for other in without for block in other.blocks])
    full = lane.running - len(without) >= lane.most_seqs
    return (
        bool(lane.free_seats) and not full and lane.blocks.free + freed >= blocks_needed(sequence, lane) + reserve(lane)
    )


def can_assign(sequence: Sequence, lane: Lane) -> bool:
    """Whether ``lane``, not being planned for now, may promise to start ``sequence`` in its next plan."""
    if lane.alone or lane.backlog() >= lane.budget or lane.running + len(lane.assigned) >= lane.most_seqs:
        return False
    promised = sum(blocks_needed(other, lane) for other in lane.assigned)
    return can_start(sequence, lane) and (
        not promised or lane.blocks.free - promised - blocks_needed(sequence, lane) >= reserve(lane)
    )


def cost(sequence: Sequence, lane: Lane) -> int:
    """Tokens that stand between ``sequence`` and its first token on ``lane``."""
    in_flight = sum(flight.prefill_tokens for flight in lane.flights)
    uncached = sequence.known_tokens - cached_blocks(sequence, lane) * lane.block_size
    return uncached + lane.backlog() + in_flight + DECODE_WEIGHT * (lane.running + len(lane.assigned))


def choose(sequence: Sequence, lanes: Iterable[Lane]) -> Lane | None:
    """The cheapest lane; more free blocks, then age, decide between equals."""
    return min(lanes, key=lambda lane: (cost(sequence, lane), -lane.blocks.free, lane.order), default=None)
