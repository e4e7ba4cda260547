"""What the ranks of one worker say to each other while they compute: sums, gathered logits, drawn ids, hidden states.

NCCL carries it between GPUs, gloo between processes on CPUs. On a CPU a sum is taken in the order of the ranks, over
gathered parts: a ring would add in an order that depends on how many numbers there are, and with it on what else is in
the batch.

Ranks are numbered stage by stage. Those of a stage hold parts of the same layers; a rank sends hidden states to the
one with the same part in the next stage.
"""

from __future__ import annotations

import datetime
from collections import deque
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, TCPStore  # torch.distributed hands them on without saying so

from protocol.messages import SEAT_BYTES
from workers.engines.base import Place

PATIENCE = datetime.timedelta(minutes=20)  # of a rank for the others: one may read its weights from a slower disk


class Group:
    """A model on one device: nothing is said. The base of those with several."""

    part, parts = 0, 1  # of the layers of a stage
    stage, stages = 0, 1
    samples = True  # draws tokens, and reports them

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ``x`` of all ranks of the stage, in their order. May overwrite ``x``."""
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The ``x`` of all ranks of the stage, in order, on its first; on the others their own alone."""
        return [x]

    def send(self, x: torch.Tensor) -> None:
        """Hidden states to the next stage, which takes them with ``receive``."""

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states of the previous stage, into ``x``."""
        return x

    def tell(self, tokens: torch.Tensor) -> None:
        """Ids just drawn (int64 [k]), to the ranks that need them as inputs."""

    def expect(self, seats: np.ndarray) -> None:
        """The rank that samples will tell what it draws for ``seats``."""

    def told(self, seats: bytes) -> list[tuple[np.ndarray, torch.Tensor]]:
        """(seats, ids) of what was expected, oldest first, up to the last that concerns one of a plan's ``seats``."""
        return []

    def least(self, value: int) -> int:
        """The least of all ranks' ``value``."""
        return value


ALONE = Group()


class Ranks(Group):
    """``place`` among the ranks that have met at its rendezvous."""

    def __init__(self, place: Place, device: torch.device) -> None:
        self.part, self.parts, self.stage, self.stages = place.part, place.parts, place.stage, place.stages
        self.rank, self.samples, self.device = place.rank, place.samples, device
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store(place), rank=place.rank, world_size=place.ranks, timeout=PATIENCE)
        stages = [list(range(at, at + self.parts)) for at in range(0, place.ranks, self.parts)]
        groups = [dist.new_group(ranks) for ranks in stages]  # each rank makes all of them, in one order
        self._first, self._sampler, self._own = stages[self.stage][0], stages[-1][0], groups[self.stage]
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()
        self._expected: deque[tuple[np.ndarray, Any, torch.Tensor]] = deque()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        if self.parts == 1:
            return x
        if x.is_cuda:
            dist.all_reduce(x, group=self._own)
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.parts)]
        dist.all_gather(parts, x.contiguous(), group=self._own)
        return reduce(torch.Tensor.add_, parts)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        if self.parts == 1:
            return [x]
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.parts)] if self.part == 0 else None
        dist.gather(x, parts, dst=self._first, group=self._own)
        return parts or [x]

    def send(self, x: torch.Tensor) -> None:
        self._post(x.contiguous(), self.rank + self.parts)

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        dist.recv(x, src=self.rank - self.parts)
        return x

    def tell(self, tokens: torch.Tensor) -> None:
        if self.stages > 1:
            for rank in range(self.parts):
                self._post(tokens, rank)
        elif self.parts > 1:
            dist.broadcast(tokens, src=self._sampler, group=self._own)

    def expect(self, seats: np.ndarray) -> None:
        if self.stages > 1 and self.stage:
            return  # ids are inputs of the first stage alone
        tokens = torch.empty(len(seats), dtype=torch.int64, device=self.device)
        if self.stages > 1:
            work = dist.irecv(tokens, src=self._sampler)
        else:
            work = dist.broadcast(tokens, src=self._sampler, group=self._own, async_op=True)
        self._expected.append((seats, work, tokens))

    def told(self, seats: bytes) -> list[tuple[np.ndarray, torch.Tensor]]:
        wanted = set(np.frombuffer(seats[: len(seats) // SEAT_BYTES * SEAT_BYTES], "<u2").tolist())
        concerned = [k for k, (of, *_) in enumerate(self._expected) if not wanted.isdisjoint(of.tolist())]
        last = concerned[-1] + 1 if concerned else 0
        found = []
        for _ in range(last):
            of, work, tokens = self._expected.popleft()
            work.wait()
            found.append((of, tokens))
        return found

    def least(self, value: int) -> int:
        told = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MIN)
        return int(told)

    def _post(self, x: torch.Tensor, rank: int) -> None:
        """Send without waiting for the other rank; ``x`` must not be written any more."""
        self._sent.append((dist.isend(x, rank), x))
        while len(self._sent) > 4 * self.stages * self.parts or (self._sent and self._sent[0][0].is_completed()):
            self._sent.popleft()[0].wait()


def _store(place: Place) -> Any:
    """Where the ranks find each other."""
    if not place.rendezvous.startswith("tcp://"):
        return FileStore(place.rendezvous, place.ranks)
    host, _, port = place.rendezvous.removeprefix("tcp://").rpartition(":")
    return TCPStore(host, int(port), place.ranks, is_master=place.rank == 0, timeout=PATIENCE)


def make_group(place: Place, device: torch.device) -> Group:
    return Ranks(place, device) if place.ranks > 1 else ALONE
