"""The core through whole histories: see simulation/. Thousands more: python -m tests.scheduler.simulation."""

from __future__ import annotations

from collections import Counter

import pytest

from scheduler.core.blocks import BlockManager
from scheduler.core.lifecycle import Lifecycle
from tests.scheduler.simulation import SimScheduler, simulate
from workers.spoiled import SpoiledBlocks

SEEDS = 150


def test_every_history_ends_as_the_undisturbed_run():
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        try:
            seen.update(simulate(seed).count)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    rare = {"kill", "hang", "takeover", "drain", "released", "false alarm", "poison", "lost hints", "resync"}
    rare |= {"dropped", "readers", "unservable"}
    ends = {"stop", "length", "abort", "deadline", "error"}
    assert not {what for what in rare | ends | {"preemptions", "prefix hits"} if not seen[what]}, "never happened"


def fails(seeds: int = SEEDS) -> bool:
    for seed in range(seeds):
        try:
            simulate(seed)
        except Exception:
            return True
    return False


def test_it_sees_a_cached_block_handed_out_with_its_name(monkeypatch: pytest.MonkeyPatch):
    def take(self: BlockManager) -> int:
        block = self._plain.pop() if self._plain else self._cached.popitem(last=False)[0]
        self._owners[block] = 1
        return block

    monkeypatch.setattr(BlockManager, "take", take)
    assert fails()


def test_it_sees_a_sequence_moved_before_its_last_hint(monkeypatch: pytest.MonkeyPatch):
    leave = Lifecycle.leave

    def leave_at_once(self: Lifecycle, sequence, *, lost_track=False):
        leave(self, sequence, lost_track=lost_track)
        worker = self.worker_of.get(sequence)
        if worker is not None and sequence in worker.departing:
            self.settle(sequence)

    monkeypatch.setattr(Lifecycle, "leave", leave_at_once)
    assert fails(4 * SEEDS)  # a rare history


def test_it_sees_blocks_of_dropped_rows_that_are_still_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BlockManager, "forget", lambda self, blocks: None)
    assert fails()


def test_it_sees_readers_of_blocks_that_were_never_written(monkeypatch: pytest.MonkeyPatch):
    def follow(self: SpoiledBlocks, plan, dropped=()):
        drops = whole(self, plan, dropped)
        if drops is not None:
            drops.others.clear()
        return drops

    whole = SpoiledBlocks.follow
    monkeypatch.setattr(SpoiledBlocks, "follow", follow)
    assert fails()


def test_it_sees_a_reader_that_came_after_the_drop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SpoiledBlocks, "_remember", lambda self, unwritten: None)
    assert fails()


def test_it_sees_journals_that_are_not_read_after_a_loss(monkeypatch: pytest.MonkeyPatch):
    lose = SimScheduler.lose

    def forgetful(self: SimScheduler, wid: str, gen: int, died: bool) -> None:
        state = self.world.server.state
        self.world.server.state = lambda rid, choice: type(state(rid, choice))()  # type: ignore[method-assign]
        try:
            lose(self, wid, gen, died)
        finally:
            self.world.server.state = state  # type: ignore[method-assign]

    monkeypatch.setattr(SimScheduler, "lose", forgetful)
    assert fails()
