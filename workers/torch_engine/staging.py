"""Host memory on the way to a device and back: pinned, made once, and used again in turn.

Pinning pages costs more than copying what a step needs, so no step pins any: arrays go out through a ring, results come
back into buffers that are returned once they have been read. ``made`` counts what was pinned since the start.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import torch

SEGMENT = 1 << 20  # bytes; what is larger is pinned for itself
SEGMENTS = 4
DEVICES = {"cuda"}  # kinds of devices that have memory of their own

made = 0


def host_bytes(size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size] on the host, pinned where ``device`` is a GPU."""
    global made
    made += 1
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


@cache
def main_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all steps. To ask torch for the current one takes longer than to mark an event in it."""
    return torch.cuda.default_stream(device)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of ``array`` on ``device``; on a GPU by an asynchronous copy from pinned memory."""
    if device.type not in DEVICES:
        return torch.from_numpy(array)
    return _outgoing(device).send(array)


class Outgoing:
    """A ring of segments. One is written again only when the copies out of it are done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._segments = [host_bytes(SEGMENT, device) for _ in range(SEGMENTS)]
        self._copied: list[Any] = [None] * SEGMENTS
        self._turn = self._at = 0

    def send(self, array: np.ndarray) -> torch.Tensor:
        source = torch.from_numpy(np.ascontiguousarray(array))
        target = torch.empty(source.shape, dtype=source.dtype, device=self.device)
        if source.numel():
            host = self._take(array.nbytes).view(source.dtype).view(source.shape)
            host.copy_(source)
            target.copy_(host, non_blocking=True)
        return target

    def _take(self, size: int) -> torch.Tensor:
        if size > SEGMENT:
            return host_bytes(size, self.device)  # torch frees it when the copy is done
        if self._at + size > SEGMENT:
            if self.device.type == "cuda":
                self._copied[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied[self._turn].record(main_stream(self.device))
            self._turn, self._at = (self._turn + 1) % SEGMENTS, 0
            if self._copied[self._turn] is not None:
                self._copied[self._turn].synchronize()
        begin, self._at = self._at, self._at + -(-size // 16) * 16
        return self._segments[self._turn][begin : begin + size]


@cache
def _outgoing(device: torch.device) -> Outgoing:
    return Outgoing(device)


class Incoming:
    """Buffers for results, taken for a step and given back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> torch.Tensor:
        with self._lock:
            for at, buffer in enumerate(self._free):
                if len(buffer) >= size:
                    return self._free.pop(at)
            self._free = self._free[1:]  # all are too small: one of them gives way to a larger one
        return host_bytes(max(1 << 14, 1 << (size - 1).bit_length()), self.device)

    def give(self, buffer: torch.Tensor) -> None:
        with self._lock:
            self._free.append(buffer)


@cache
def _incoming(device: torch.device) -> Incoming:
    return Incoming(device)


class Returned:
    """Tensors of a step on their way to the host; any thread may read them until ``release``."""

    def __init__(self, results: tuple[torch.Tensor | None, ...], device: torch.device) -> None:
        self._buffer: torch.Tensor | None = None
        self._copied: Any = None
        self._results: list[torch.Tensor | None] = list(results)
        self._queue(device)

    def _queue(self, device: torch.device) -> None:
        sizes = [0 if t is None else -(-t.nbytes // 16) * 16 for t in self._results]
        self._pool = _incoming(device)
        self._buffer = buffer = self._pool.take(sum(sizes))
        if device.type != "cuda":
            self._copy(buffer, sizes)
            return
        self._copy(buffer, sizes)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(main_stream(device))

    def _copy(self, buffer: torch.Tensor, sizes: list[int]) -> None:
        at = 0
        for k, (tensor, size) in enumerate(zip(self._results, sizes, strict=True)):
            if tensor is not None:
                host = buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                self._results[k] = host.copy_(tensor, non_blocking=True)
            at += size

    def wait(self) -> list[np.ndarray | None]:
        """The tensors as arrays, once they are there. They are no one's after ``release``: copy what is kept."""
        if self._copied is not None:
            self._copied.synchronize()
        return [None if tensor is None else tensor.numpy() for tensor in self._results]

    def release(self) -> None:
        """Nobody reads them any more."""
        if self._buffer is not None:
            self._pool.give(self._buffer)
            self._buffer = None
