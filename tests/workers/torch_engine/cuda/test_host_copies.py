"""Copies beside the steps: the kernel against plain copies, and their order on a device that does what it may."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from protocol.messages import NewSequence, Plan, pack_ids
from protocol.sampling import SamplingParams
from scheduler.core.blocks import BlockManager
from scheduler.core.host_blocks import HostBlocks
from tests.workers.torch_engine.cuda.triton_device import DEVICE
from tests.workers.torch_engine.test_kv_pool import plan
from workers.torch_engine.cuda import host_copies
from workers.torch_engine.cuda.host_copies import HostCopies
from workers.torch_engine.kv_pool import KVPool, LayerShape

SEATS = 8


def silent(stage, fraction):
    pass


def filled(shapes, blocks, size, dtype, device=DEVICE):
    pool = KVPool(shapes, blocks, size, dtype, device)
    for tensor in (*pool.keys, *pool.values):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return pool


@pytest.mark.parametrize(
    ("dtype", "shapes", "size"),
    [
        (torch.float32, [LayerShape(2, 8, 8)], 4),
        (torch.bfloat16, [LayerShape(2, 16, 16), LayerShape(1, 6, 10)], 4),  # words of 4 bytes
        (torch.float16, [LayerShape(1, 3, 5)], 1),  # of 2
        (torch.float32, [LayerShape(1, 64, 64)], 40),  # more words than a program copies at once
    ],
)
def test_the_kernel_copies_blocks_there_and_back(dtype, shapes, size, monkeypatch):
    monkeypatch.setattr(host_copies, "CHUNK", 2 * size * sum(s.numbers for s in shapes) * dtype.itemsize)
    monkeypatch.setattr(host_copies, "PROGRAMS", 3)
    pool = filled(shapes, 6, size, dtype)
    host = HostCopies(pool, 5, SEATS, silent)
    assert len(host._chunks) == 3, "two blocks in each"
    before = [part.clone() for part in pool.parts()]
    host.follow(plan(out=[(4, 0), (1, 2), (5, 4)]))
    settle()
    for part in pool.parts():
        part.zero_()
    host.follow(plan(into=[(2, 0), (0, 3), (4, 2)]))
    settle()
    for part, held in zip(pool.parts(), before, strict=True):
        assert torch.equal(part[[0, 3, 2]], held[[1, 4, 5]])
        assert not part[[1, 4, 5]].any()


def test_it_is_known_how_long_a_block_takes():
    host = HostCopies(filled([LayerShape(1, 8, 8)], 4, 4, torch.float32), 3, SEATS, silent)
    assert (host.capacity.kind, host.capacity.units) == ("host", 3)
    assert (host.capacity.copy_us > 0) == (DEVICE.type == "cuda")


def settle():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


class Device:
    """Three queues. Whose turn it is, and when, is drawn: all that holds is what was waited for."""

    def __init__(self, rng: Random, deaf: int | None) -> None:
        """``deaf``: the queue that waits for nothing."""
        self.rng = rng
        self.queues = [DrawnQueue(number == deaf) for number in range(3)]

    def run(self, turns: int) -> None:
        for _ in range(turns):
            able = [queue for queue in self.queues if queue.able()]
            if not able:
                return
            self.rng.choice(able).turn()


class DrawnQueue:
    def __init__(self, deaf: bool) -> None:
        self.deaf = deaf
        self.items = []
        self.done = 0

    def launch(self, run):
        self.items.append(run)

    def mark(self):
        end = len(self.items)
        return SimpleNamespace(query=lambda: self.done >= end)

    def wait(self, mark):
        if not self.deaf:
            self.items.append(mark)

    def able(self):
        head = self.items[self.done] if self.done < len(self.items) else None
        return head is not None and (callable(head) or head.query())

    def turn(self):
        item = self.items[self.done]
        if callable(item):
            item()
        self.done += 1


class Story:
    """Prompts come, share, end and return; each of their steps reads what it was given and writes the rest."""

    def __init__(self, seed: int, deaf: int | None = None) -> None:
        self.rng = rng = Random(seed)
        self.pool = KVPool([LayerShape(1, 1, 1)], 7, 4, torch.float32, torch.device("cpu"))
        self.manager = BlockManager(7, 4, HostBlocks(rng.choice((2, 5, 30))))
        self.device = Device(rng, deaf)
        self.host = HostCopies(self.pool, self.manager.host.total, SEATS, silent, self.device.queues)
        self.host._launch = self.copy
        self.running = {}  # seat -> (prompt, table)
        self.fresh = {}  # seat -> first block that it writes
        self.wrong = self.loaded = 0

    def copy(self, blocks, addresses, out):
        """As the kernel does, without the interpreter's time."""
        hosts = (addresses.numpy() - self.host._bases[0]) // self.host.block_bytes
        rows = self.host._chunks[0].view(-1, self.host.block_bytes).view(torch.float32)
        for block, host in zip(blocks.tolist(), hosts.tolist(), strict=True):
            for tensor, at in ((self.pool.keys[0], 0), (self.pool.values[0], 4)):
                place, slots = rows[host, at : at + 4], tensor.view(8, 4)[block]
                place.copy_(slots) if out else slots.copy_(place)

    def step(self) -> None:
        rng, manager = self.rng, self.manager
        for seat in [seat for seat in self.running if rng.random() < 0.3]:
            manager.release(self.running.pop(seat)[1])
            self.fresh.pop(seat, None)
        new = []
        for seat in {seat for seat in range(4) if seat not in self.running and rng.random() < 0.5}:
            prompt, count = rng.randrange(5), rng.randint(2, 3)
            names = [f"{prompt}:{k}".encode() for k in range(count)]
            hits = names[: manager.match(names[:-1])]
            if manager.can_start(hits, count):
                table = manager.start(hits, count)
                self.running[seat], self.fresh[seat] = (prompt, table), len(hits)
                ids = pack_ids(range(4 * count))
                new.append(NewSequence(
                    seat, "r", 0, 1, ids, 4 * count, SamplingParams(), 0, 0, pack_ids(table), 4 * len(hits)
                ))  # fmt: skip
        rows = [seat for seat in self.running if rng.random() < 0.8]
        for seat in set(rows) & set(self.fresh):
            prompt, table = self.running[seat]
            for k in range(self.fresh[seat], len(table)):
                manager.publish(table[k], f"{prompt}:{k}".encode())
        out, into = manager.take_copies(rng.randrange(4))
        self.loaded += len(into)
        made = Plan(0, 0, 0, new=new, copies_out=out, copies_in=into)
        self.host.follow(made)
        self.host.await_blocks(SimpleNamespace(seats=np.array(rows, np.int64)))
        work = [(*self.running[seat], self.fresh.pop(seat, None)) for seat in rows]
        self.device.queues[0].launch(lambda: self.compute(work))
        self.device.run(rng.randrange(6))

    def compute(self, work) -> None:
        """All rows write before any reads, as a layer does."""
        tensors = [tensor.view(8, 4) for tensor in (self.pool.keys[0], self.pool.values[0])]
        for prompt, table, first in work:
            for k in range(len(table) if first is None else first, len(table)):
                for tensor in tensors:
                    tensor[table[k]] = 10 * prompt + k
        for prompt, table, _ in work:
            for k, block in enumerate(table):
                self.wrong += not all((tensor[block] == 10 * prompt + k).all() for tensor in tensors)

    def tell(self, steps: int = 120) -> int:
        """Reads of what was not to be read."""
        for _ in range(steps):
            self.step()
            self.manager.check_integrity([table for _, table in self.running.values()])
        self.device.run(1 << 30)
        assert all(queue.done == len(queue.items) for queue in self.device.queues), "they wait for each other"
        return self.wrong


def test_steps_read_what_is_theirs_whenever_copies_are_made():
    stories = [Story(seed) for seed in range(12)]
    assert sum(story.tell() for story in stories) == 0
    assert sum(story.loaded for story in stories) > 0


@pytest.mark.parametrize("deaf", [0, 1, 2])
def test_without_the_waits_of_a_queue_they_would_not(deaf):
    assert any(Story(seed, deaf).tell() for seed in range(12))
