"""Placement: which worker a waiting sequence goes to.

The cost of a worker is the number of tokens to compute before the first token of the sequence: those of its own prompt
that are not cached there, plus those of other work ahead of it. So requests with a long common prompt go to the same
worker until its backlog exceeds the length of that prompt. Preferring the longest prefix whatever the load would send
every user of one system prompt to one worker.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.core.sequence import PrefixHits, Sequence
from scheduler.core.worker import WorkerState

DECODE_WEIGHT = 16  # cost of a running sequence in prompt tokens: an estimate of its remaining rows


def cached_blocks(sequence: Sequence, worker: WorkerState) -> int:
    """Leading blocks of ``sequence`` that ``worker`` holds; never all of its tokens: the last must be computed.

    Choosing a worker, checking for room and starting all ask; the answer is looked up once, until hashes come or go.
    None count for a prompt whose own logprobs are asked for: what is cached has none.
    """
    if sequence.scores_prompt:
        return 0
    blocks, known = worker.blocks, sequence.known_tokens
    seen = sequence.prefix_hits.get(worker.wid)
    if seen is not None and seen.blocks is blocks and (seen.version, seen.known) == (blocks.version, known):
        return seen.hits
    hits = blocks.match(sequence.prefix_hashes(worker.block_size)[: (known - 1) // worker.block_size])
    sequence.prefix_hits[worker.wid] = PrefixHits(blocks, blocks.version, known, hits)
    return hits


def blocks_needed(sequence: Sequence, worker: WorkerState) -> int:
    """A start takes blocks for all known tokens at once: a begun prefill is never stopped for want of one."""
    return worker.blocks.blocks_for(sequence.known_tokens)


def reserve(worker: WorkerState) -> int:
    """Blocks that a start must leave free while others run, so that it does not preempt what it joins."""
    return max(1, worker.blocks.total // 100) if worker.running else 0


def can_start(sequence: Sequence, worker: WorkerState) -> bool:
    """Whether ``worker`` has a seat and the blocks for ``sequence`` right now."""
    if worker.draining or not worker.fits(sequence) or not worker.free_seats or worker.running >= worker.most_seqs:
        return False
    hits = sequence.prefix_hashes(worker.block_size)[: cached_blocks(sequence, worker)]
    return worker.blocks.can_start(hits, blocks_needed(sequence, worker), reserve(worker))


def could_start(sequence: Sequence, worker: WorkerState, without: list[Sequence]) -> bool:
    """Whether ``worker`` could surely start ``sequence`` without those in ``without``; their shared blocks do not
    count."""
    freed = worker.blocks.owned_once([block for other in without for block in other.blocks])
    full = worker.running - len(without) >= worker.most_seqs
    return (
        bool(worker.free_seats)
        and not full
        and worker.blocks.free + freed >= blocks_needed(sequence, worker) + reserve(worker)
    )


def can_assign(sequence: Sequence, worker: WorkerState) -> bool:
    """Whether ``worker``, not being planned for now, may promise to start ``sequence`` in its next plan."""
    if (
        worker.quarantined
        or worker.backlog() >= worker.budget
        or worker.running + len(worker.assigned) >= worker.most_seqs
    ):
        return False
    promised = sum(blocks_needed(other, worker) for other in worker.assigned)
    return can_start(sequence, worker) and (
        not promised or worker.blocks.free - promised - blocks_needed(sequence, worker) >= reserve(worker)
    )


def cost(sequence: Sequence, worker: WorkerState) -> int:
    """Tokens to compute on ``worker`` before the first token of ``sequence``."""
    in_flight = sum(batch.prefill_tokens for batch in worker.in_flight)
    uncached = sequence.known_tokens - cached_blocks(sequence, worker) * worker.block_size
    return uncached + worker.backlog() + in_flight + DECODE_WEIGHT * (worker.running + len(worker.assigned))


def choose(sequence: Sequence, workers: Iterable[WorkerState]) -> WorkerState | None:
    """The worker of least cost; ties go to more free blocks, then to the older worker."""
    return min(workers, key=lambda worker: (cost(sequence, worker), -worker.blocks.free, worker.order), default=None)
