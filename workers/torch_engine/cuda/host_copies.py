"""Copies between the KV pool and host memory beside the steps: one launch for a plan's, in each direction.

**Order.** Each direction has a stream of its own. Its launches wait for the steps that were queued before, and for
those of the other direction that touch the same block or host block; a step waits for launches that touch blocks of its
rows' tables. A block can only come into a table by a plan, so it is looked at when it is handed out and not at every
step. Launches of a direction are numbered; for each block stands the number of the last one that touches it.

**The kernel** reads and writes pinned host memory directly. Few programs keep the bus busy, and leave the
multiprocessors to the steps.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import triton
import triton.language as tl

from protocol.messages import ID_BYTES, Plan
from workers.engines.base import Progress
from workers.torch_engine.inputs import SampledRows
from workers.torch_engine.kv_pool import HostPool, KVPool
from workers.torch_engine.staging import host_bytes, main_stream, to_device

CHUNK = 1 << 30  # bytes that are pinned at once
PROGRAMS = 16
WORDS = 1024  # that a program copies at once
TIMED = 64  # blocks that are copied to see how long that takes


@triton.jit(do_not_specialize=["jobs"])
def copy_blocks(
    blocks, hosts, parts, jobs,
    PARTS: tl.constexpr, WORD: tl.constexpr, BYTES: tl.constexpr, WORDS_: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Grid (programs). Job j: block ``blocks[j]`` of the pool and the host block at address ``hosts[j]``. ``parts``
    int64 [PARTS, 3]: address of a tensor of the pool, bytes of a block in it, where these lie in a host block."""
    at = tl.arange(0, WORDS_)
    for unit in range(tl.program_id(0), jobs * PARTS, tl.num_programs(0)):
        job, part = unit // PARTS, unit % PARTS
        size = tl.load(parts + part * 3 + 1)
        here = tl.load(parts + part * 3) + tl.load(blocks + job) * size
        there = tl.load(hosts + job) + tl.load(parts + part * 3 + 2)
        pool = here.to(tl.pointer_type(WORD))
        host = there.to(tl.pointer_type(WORD))
        words = size // BYTES
        for start in range(0, words, WORDS_):
            inside = start + at < words
            if OUT:
                tl.store(host + start + at, tl.load(pool + start + at, mask=inside), mask=inside)
            else:
                tl.store(pool + start + at, tl.load(host + start + at, mask=inside), mask=inside)


class Mark(Protocol):
    """A place in a queue."""

    def query(self) -> bool:
        """Whether all before it is done."""


class Queue(Protocol):
    """Launches that a device makes in order."""

    def launch(self, run: Callable[[], None]) -> None: ...

    def mark(self) -> Mark: ...

    def wait(self, mark: Mark) -> None:
        """What is launched from here on comes after ``mark`` of another queue."""


class StreamQueue:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def launch(self, run: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            run()

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def wait(self, mark: Any) -> None:
        self._stream.wait_event(mark)


class InOrder:
    """Where kernels are interpreted: each launch is done at once."""

    def launch(self, run: Callable[[], None]) -> None:
        run()

    def mark(self) -> Mark:
        return self

    def query(self) -> bool:
        return True

    def wait(self, mark: Mark) -> None:
        pass


def queues_of(device: torch.device) -> tuple[Queue, Queue, Queue]:
    """Of the steps, of copies out and of copies in."""
    if device.type != "cuda":
        return InOrder(), InOrder(), InOrder()
    directions = [torch.cuda.Stream(device, priority=-1) for _ in range(2)]  # type: ignore[no-untyped-call]
    return StreamQueue(main_stream(device)), StreamQueue(directions[0]), StreamQueue(directions[1])


class Direction:
    """The copies of one direction, and what of them may not be done yet."""

    def __init__(self, queue: Queue, blocks: int, hosts: int, seats: int) -> None:
        self.queue = queue
        self.pending: deque[tuple[int, Mark, Any]] = deque()  # number, its end, what it reads
        self._count = self._awaited = 0
        self._of_block = np.zeros(blocks, np.int64)
        self._of_host = np.zeros(hosts, np.int64)
        self._of_seat = np.zeros(seats, np.int64)

    def note(self, blocks: np.ndarray, hosts: np.ndarray, kept: Any) -> None:
        """A launch was queued that touches these and reads ``kept``."""
        self._count += 1
        self._of_block[blocks] = self._of_host[hosts] = self._count
        self.pending.append((self._count, self.queue.mark(), kept))

    def touching(self, blocks: np.ndarray, hosts: np.ndarray) -> Mark | None:
        """The end of the last launch that touches one of these; None if it is done."""
        return self._end_of(max(self._of_block[blocks].max(initial=0), self._of_host[hosts].max(initial=0)))

    def hand_out(self, seat: int, packed: bytes, anew: bool) -> None:
        """``seat`` has these blocks, int32 bytes: all that it has, or some more."""
        if not 0 <= seat < len(self._of_seat):
            return  # given up by what checks plans
        ids = np.frombuffer(packed[: len(packed) // ID_BYTES * ID_BYTES], "<i4")
        number = self._of_block[ids[(ids >= 0) & (ids < len(self._of_block))]].max(initial=0)
        self._of_seat[seat] = number if anew else max(self._of_seat[seat], number)

    def awaited_by(self, seats: np.ndarray) -> Mark | None:
        """What the steps have to wait for that has rows of these seats, if they have not waited for it before."""
        number = int(self._of_seat[seats].max(initial=0))
        if number <= self._awaited:
            return None
        self._awaited = number
        return self._end_of(number)

    def busy(self) -> bool:
        """Whether something is not done yet."""
        while self.pending and self.pending[0][1].query():
            self.pending.popleft()
        return bool(self.pending)

    def _end_of(self, number: int) -> Mark | None:
        self.busy()
        return next((mark for count, mark, _ in self.pending if count >= number), None) if number else None


class HostCopies(HostPool):
    """Host memory in pinned chunks, and the copies to and from it."""

    def __init__(
        self, pool: KVPool, blocks: int, seats: int, progress: Progress, queues: Sequence[Queue] | None = None
    ) -> None:
        self.device = pool.keys[0].device
        self._progress = progress
        super().__init__(pool, blocks)
        self.main, out, into = queues or queues_of(self.device)
        self.out, self.into = (Direction(queue, pool.blocks, blocks, seats) for queue in (out, into))
        self._parts, self._word = self._describe()

    def _take_memory(self) -> None:
        self._per_chunk = max(1, CHUNK // self.block_bytes)
        self._chunks = []
        for first in range(0, self.blocks, self._per_chunk):
            self._progress("host memory", first / self.blocks)
            size = min(self._per_chunk, self.blocks - first) * self.block_bytes
            self._chunks.append(host_bytes(size, self.device))
        self._bases = np.array([chunk.data_ptr() for chunk in self._chunks], np.int64)

    def _describe(self) -> tuple[torch.Tensor, dict[str, Any]]:
        """The kernel's ``parts``, and the widest word that all of them consist of."""
        sizes = np.array([part.shape[1] for part in self.parts], np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        table = np.stack([np.array([part.data_ptr() for part in self.parts], np.int64), sizes, starts], 1)
        words = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
        width = next(width for width in words if not (table % width).any() and not (self._bases % width).any())
        return torch.from_numpy(table).to(self.device), {"WORD": words[width], "BYTES": width}

    def follow(self, plan: Plan) -> None:
        super().follow(plan)
        for direction in (self.out, self.into):
            if not direction.busy():
                continue
            for new in plan.new:
                shared = new.computed // self.pool.block_size if direction is self.out else 0  # read while copied out
                direction.hand_out(new.seat, new.block_table[shared * ID_BYTES :], anew=True)
            for seat, packed in plan.blocks:
                direction.hand_out(seat, packed, anew=False)

    def await_blocks(self, step: SampledRows) -> None:
        for direction in (self.out, self.into):
            if direction.pending and (mark := direction.awaited_by(step.seats)) is not None:
                self.main.wait(mark)

    def _copy_out(self, blocks: np.ndarray, hosts: np.ndarray) -> None:
        self._queue(self.out, self.into, blocks, hosts)

    def _copy_in(self, hosts: np.ndarray, blocks: np.ndarray) -> None:
        self._queue(self.into, self.out, blocks, hosts)

    def _queue(self, direction: Direction, other: Direction, blocks: np.ndarray, hosts: np.ndarray) -> None:
        """One launch, behind the steps queued so far and what ``other`` has to do with the same blocks."""
        addresses = self._bases[hosts // self._per_chunk] + hosts % self._per_chunk * self.block_bytes
        given = to_device(blocks, self.device), to_device(addresses, self.device)
        direction.queue.wait(self.main.mark())
        if (mark := other.touching(blocks, hosts)) is not None:
            direction.queue.wait(mark)
        out = direction is self.out
        direction.queue.launch(lambda: self._launch(*given, out))
        direction.note(blocks, hosts, given)

    def _launch(self, blocks: torch.Tensor, addresses: torch.Tensor, out: bool) -> None:
        copy_blocks[(PROGRAMS,)](
            blocks, addresses, self._parts, len(blocks),
            PARTS=len(self.parts), WORDS_=WORDS, OUT=out, num_warps=4, **self._word,
        )  # fmt: skip

    def copy_us(self) -> float:
        """Measured, before there is anything to copy; both kernels are compiled by it."""
        if self.device.type != "cuda":
            return 0.0
        count = min(TIMED, self.pool.blocks, self.blocks)
        which = to_device(np.arange(count), self.device)
        addresses = to_device(self._bases[0] + np.arange(min(count, self._per_chunk)) * self.block_bytes, self.device)
        least = float("inf")
        for out in (True, False, False, False):
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            began.record()
            self._launch(which[: len(addresses)], addresses, out)
            ended.record()
            ended.synchronize()
            least = least if out else min(least, began.elapsed_time(ended))
        return 1e3 * least / len(addresses)
