"""A scheduler of eighty lines for tests of engines: chunked prefill, preemption, prefix sharing, plans ahead.

It decides the way the real core does where an engine can tell the difference (a plan is made before the
tokens of the one before it are known; rows past a sequence's end are computed and thrown away) and nowhere else.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from workers.engines.base import Sampled


@dataclass
class Sequence:
    prompt: list[int]
    sampling: SamplingParams
    seed: int = 0
    joins: int = 0  # step at which it arrives
    end_ids: frozenset[int] = frozenset()  # what ends it before its max_tokens
    output: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    seat: int | None = None
    placement: int = 0
    computed: int = 0  # scheduled so far
    expected: int = 0  # tokens known once all plans so far are done
    blocks: list[int] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        assert self.sampling.max_tokens is not None
        return len(self.prompt) + self.sampling.max_tokens

    @property
    def finished(self) -> bool:
        return len(self.prompt) + len(self.output) >= self.wanted or bool(self.end_ids.intersection(self.output[-1:]))


class PlanMaker:
    """Drives ``engine`` until every sequence has its max_tokens. ``ahead``: plans in flight beyond the first."""

    def __init__(self, engine: Any, blocks: int, block_size: int, budget: int, seats: int = 64, ahead: int = 1) -> None:
        self.engine, self.block_size, self.budget, self.ahead = engine, block_size, budget, ahead
        self.free = list(range(blocks))
        self.owners: Counter[int] = Counter()
        self.shared: dict[tuple[int, ...], int] = {}  # ids up to a full block's end -> that block
        self.free_seats = list(range(seats))
        self.running: list[Sequence] = []
        self.frees: list[int] = []
        self._preempted: list[Sequence] = []
        self.step = self.preemptions = self.shared_blocks = 0

    def run(self, sequences: list[Sequence], before_step: Any = None) -> None:
        """Run all to their end; ``before_step(step)`` is called between steps."""
        waiting = deque(sorted(sequences, key=lambda s: s.joins))
        in_flight: deque[tuple[Any, list[tuple[Sequence, int]]]] = deque()
        while waiting or self.running or in_flight:
            plan, sampling = self._plan(waiting)
            if before_step is not None:
                before_step(self.step)
            if plan is not None:
                in_flight.append((self.engine.execute(plan), sampling))
            if len(in_flight) > self.ahead or plan is None:
                if not in_flight and not waiting:
                    break
                if in_flight:
                    self._absorb(*in_flight.popleft())
        assert not self.owners

    def _plan(self, waiting: deque[Sequence]) -> tuple[Plan | None, list[tuple[Sequence, int]]]:
        self.step += 1
        left, rows, new, grown = self.budget, [], [], []
        for sequence in sorted(self.running, key=lambda s: s.expected - s.computed > 1):  # decodes first
            count = min(sequence.expected - sequence.computed, left)
            if count and sequence in self.running and sequence.expected < sequence.wanted + 1:
                added = self._room(sequence, sequence.computed + count, rows)
                if added is None or sequence not in self.running:
                    continue
                if added:
                    grown.append((sequence, added))
                rows.append((sequence, count))
                left -= count
        while waiting and left and waiting[0].joins <= self.step and self.free_seats:
            sequence = waiting[0]
            ids = sequence.prompt + sequence.output
            if -(-len(ids) // self.block_size) + 1 > len(self.free):
                break
            waiting.popleft()
            new.append(self._start(sequence, ids))
            count = min(len(ids) - sequence.computed, left)
            rows.append((sequence, count))
            left -= count
        return self._emit(rows, new, grown, waiting)

    def _emit(self, rows: Any, new: Any, grown: Any, waiting: deque[Sequence]) -> Any:
        rows = [(s, n) for s, n in rows if s in self.running]
        for sequence in self._preempted:
            waiting.appendleft(sequence)
        self._preempted.clear()
        frees, self.frees = self.frees, []
        if not rows and not frees:
            return None, []
        samples = []
        for sequence, count in rows:
            self._share(sequence, sequence.computed + count)
            sequence.computed += count
            samples.append(sequence.computed == sequence.expected)
            sequence.expected += samples[-1]
        plan = Plan(
            0, 0, self.step,
            array("H", [s.seat for s, _ in rows]).tobytes(),
            b"" if all(n == 1 for _, n in rows) else pack_ids(n for _, n in rows),
            b"" if all(samples) else bytes(samples),
            new=new,
            blocks=[(s.seat, pack_ids(added)) for s, added in grown if s in self.running],
            frees=frees,
        )  # fmt: skip
        return plan, [(s, s.placement) for (s, _), drawn in zip(rows, samples, strict=True) if drawn]

    def _start(self, sequence: Sequence, ids: list[int]) -> NewSequence:
        size = self.block_size
        sequence.seat = self.free_seats.pop(0)
        sequence.placement += 1
        sequence.blocks = []
        while (len(sequence.blocks) + 1) * size < len(ids):
            block = self.shared.get(tuple(ids[: (len(sequence.blocks) + 1) * size]))
            if block is None:
                break
            sequence.blocks.append(block)
            self.owners[block] += 1
            self.shared_blocks += 1
        sequence.computed = len(sequence.blocks) * size
        while len(sequence.blocks) * size < len(ids):
            sequence.blocks.append(self._take())
        sequence.expected = len(ids)
        self.running.append(sequence)
        return NewSequence(
            sequence.seat, "r", 0, sequence.placement, pack_ids(ids), len(sequence.prompt), sequence.sampling,
            sequence.seed, 0, pack_ids(sequence.blocks), sequence.computed,
        )  # fmt: skip

    def _share(self, sequence: Sequence, computed: int) -> None:
        """Prompt blocks that this plan fills may be joined by those of later plans."""
        size = self.block_size
        for end in range(size, min(computed, len(sequence.prompt)) + 1, size):
            self.shared.setdefault(tuple(sequence.prompt[:end]), sequence.blocks[end // size - 1])

    def _take(self) -> int:
        block = self.free.pop(0)
        self.owners[block] = 1
        return block

    def _room(self, sequence: Sequence, tokens: int, rows: Any) -> list[int] | None:
        """Blocks added so that ``tokens`` fit; the newest running sequences make way. None: it made way itself."""
        added = []
        while len(sequence.blocks) * self.block_size < tokens:
            while not self.free:
                victim = self.running[-1]
                self._leave(victim)
                self._preempted.append(victim)
                self.preemptions += 1
                if victim is sequence:
                    return None
            added.append(self._take())
            sequence.blocks.append(added[-1])
        return added

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.seat is not None
        self.running.remove(sequence)
        self.frees.append(sequence.seat)
        self.free_seats.append(sequence.seat)
        sequence.placement += 1  # what is in flight for it is void: it will be computed again
        for block in sequence.blocks:
            self.owners[block] -= 1
            if not self.owners[block]:
                del self.owners[block]
                self.free.append(block)
                self.shared = {ids: at for ids, at in self.shared.items() if at != block}

    def _absorb(self, output: Any, sampling: list[tuple[Sequence, int]]) -> None:
        sampled: Sampled = output.wait()
        assert len(sampled.tokens) == len(sampling)
        for (sequence, placement), seat, token in zip(sampling, sampled.seats, sampled.tokens, strict=True):
            if sequence.placement != placement or sequence.finished:
                continue  # preempted meanwhile, or past its end
            sequence.output.append(int(token))
            sequence.logprobs.append(sampled.logprobs.get(int(seat)))
            if sequence.finished:
                self._leave(sequence)
