"""CUDA graphs: the launches of a forward pass recorded once per bucket, and replayed for every step that fits.

A step of a model is hundreds of launches; queueing them one by one takes the host longer than a small step takes the
device. A recorded pass is queued at once. It reads nothing but the tables of its bucket (step_tables.py), so running a
step is: fill the tables, copy them, replay. What no bucket holds, or where recording fails, runs launch by launch over
tables of its own size, with the same code.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from workers.engines.base import Progress
from workers.torch_engine.cuda.step_tables import Layout, StepTables, TableSeats
from workers.torch_engine.cuda.work_list import WorkShape
from workers.torch_engine.inputs import HostStep
from workers.torch_engine.staging import host_bytes, main_stream

log = logging.getLogger(__name__)

SINGLES = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
MIXED = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048)  # tokens
MIXED_ROWS = (8, 64)  # and as many as there may be
TIMING_S = 1.0  # most that timing the recorded steps may take
REPLAYS = 4
HOST_BUFFERS = 4  # steps whose tables may still be on their way to the device


@dataclass(frozen=True)
class Bucket:
    """Steps of at most ``tokens`` tokens in ``rows`` rows. ``single``: every row has one token, sampled before."""

    tokens: int
    rows: int
    single: bool


def choose_buckets(max_tokens: int, max_rows: int) -> list[Bucket]:
    """Largest first, so that smaller ones find room in the memory of larger ones."""
    singles = {min(n, max_rows, max_tokens) for n in SINGLES if n < 2 * max_rows}
    found = {Bucket(n, n, True) for n in singles}
    for tokens in {min(n, max_tokens) for n in MIXED}:
        found |= {Bucket(tokens, min(rows, tokens, max_rows), False) for rows in (*MIXED_ROWS, max_rows)}
    return sorted(found, key=lambda bucket: (bucket.tokens, bucket.rows, bucket.single), reverse=True)


class Recording(Protocol):
    """One pass over fixed tables. ``output`` is overwritten by each ``replay``."""

    output: torch.Tensor

    def replay(self) -> None: ...


class Rerun:
    """A recording where there are no graphs: the same function is called again, over the same tables."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._run = run
        self.output = run()

    def replay(self) -> None:
        self.output.copy_(self._run())


class CudaRecording:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: torch.Tensor) -> None:
        self._graph, self.output = graph, output

    def replay(self) -> None:
        self._graph.replay()


class CudaRecorder:
    """Records passes that share one pool of memory: they never run at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], torch.Tensor]) -> CudaRecording:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # compiles kernels and chooses algorithms: neither can be done while recording
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = run()
        return CudaRecording(graph, output)


@dataclass
class _Recorded:
    bucket: Bucket
    layout: Layout
    buffer: torch.Tensor
    recording: Recording


class TableSteps:
    """Runs steps: replayed where a bucket holds them, launch by launch otherwise.

    ``forward`` gives the logits [R, vocabulary] of a step in tables, ``shape`` the bounds of the work of a bucket.
    """

    def __init__(
        self,
        forward: Callable[[StepTables], torch.Tensor],
        shape: Callable[[Bucket], WorkShape],
        seats: TableSeats,
        device: torch.device,
    ) -> None:
        self._forward, self._shape = forward, shape
        self.seats, self.device = seats, device
        self._recorded: list[_Recorded] = []  # smallest first
        self._hosts: list[torch.Tensor] = [torch.zeros(0, dtype=torch.uint8) for _ in range(HOST_BUFFERS)]
        self._copied: list[torch.cuda.Event | None] = [None] * HOST_BUFFERS  # made once, marked anew
        self._turn = 0
        self.capture_s = 0.0
        self.capture_bytes = 0
        self.trace: list[torch.cuda.Event] | None = None  # for benchmarks: when the device began each step

    @property
    def buckets(self) -> list[Bucket]:
        return [recorded.bucket for recorded in self._recorded]

    def record(
        self, buckets: list[Bucket], recorder: Callable[[Callable[[], torch.Tensor]], Recording], progress: Progress
    ) -> None:
        """Record a pass for each of ``buckets``, largest first. A model that cannot be recorded runs without."""
        began, before = time.perf_counter(), self._memory()
        layouts = [Layout(b.tokens, b.rows, self._shape(b), b.single) for b in buckets]
        largest = max(layout.nbytes for layout in layouts)
        self._hosts = [host_bytes(largest, self.device) for _ in range(HOST_BUFFERS)]
        buffer = torch.zeros(largest, dtype=torch.uint8, device=self.device)
        recorded = []
        gc.collect()
        gc.freeze()  # each recording begins with a collection, which takes long over the modules of a whole model
        try:
            for done, (bucket, layout) in enumerate(zip(buckets, layouts, strict=True)):
                progress("capture", done / len(buckets))
                self._copy(layout, buffer, _nothing())
                tables = layout.views(buffer, self.seats)
                recording = recorder(lambda tables=tables: self._forward(tables))  # type: ignore[misc]
                recorded.append(_Recorded(bucket, layout, buffer, recording))
        except torch.OutOfMemoryError:
            log.warning("no memory for more than %d of %d CUDA graphs", len(recorded), len(buckets))
        except Exception as error:
            name, reason = type(error).__name__, _first_line(error)
            log.warning("this model runs without CUDA graphs: %s: %s", name, reason, exc_info=True)
            recorded = []
        finally:
            gc.unfreeze()
        self._recorded = recorded[::-1]
        progress("capture", 1.0)
        self.capture_s, self.capture_bytes = time.perf_counter() - began, self._memory() - before
        if recorded:
            mib = self.capture_bytes / 2**20
            log.info("%d CUDA graphs recorded in %.1f s, %.0f MiB", len(recorded), self.capture_s, mib)

    @torch.inference_mode()
    def time_steps(self, filled: Callable[[Bucket], HostStep], most_s: float = TIMING_S) -> list[tuple[int, int]]:
        """(tokens, microseconds) of recorded steps, the least of a few replays of each size with as many rows as there
        may be: what the scheduler sizes its chunks by. Empty where ``most_s`` seconds do not do for all.

        ``filled`` gives a step that fills a bucket with tokens that differ: experts that nobody chose cost nothing.
        """
        widest: dict[int, _Recorded] = {}
        for recorded in self._recorded:  # smallest first
            if not recorded.bucket.single:
                widest[recorded.bucket.tokens] = recorded
        began, times = time.perf_counter(), []
        for tokens, recorded in sorted(widest.items()):
            took = []
            step = filled(recorded.bucket)
            self.seats.send_tables()
            for _ in range(REPLAYS):
                self._copy(recorded.layout, recorded.buffer, step)
                took.append(self._time(recorded.recording))
                if time.perf_counter() - began > most_s:
                    return []
            times.append((tokens, max(1, round(min(took) * 1e6))))
        return times

    def _time(self, recording: Recording) -> float:
        """Seconds that the device takes for one replay."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            recording.replay()
            return time.perf_counter() - began
        before = _mark(self.device)
        recording.replay()
        after = _mark(self.device)
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3

    def forget(self) -> None:
        """From here on every step runs launch by launch."""
        self._recorded = []

    def run(self, step: HostStep, replay: bool = True, single: bool | None = None) -> torch.Tensor:
        """Logits [k, vocabulary] of the step's logit rows. What the last call returned may be overwritten. ``single``
        False: not as a step of decodes, even if it is one."""
        self.seats.send_tables()
        single = self.seats.single(step) if single is None else single
        recorded = self._find(step, single) if replay else None
        if recorded is None:
            tokens, rows = int(step.row_starts[-1]), max(len(step.seats), len(step.logit_rows))
            layout = Layout(tokens, rows, self._shape(Bucket(tokens, rows, single)), single)
            buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=self.device)
        else:
            layout, buffer = recorded.layout, recorded.buffer
        self._copy(layout, buffer, step)
        if self.trace is not None:
            self.trace.append(_mark(self.device))
        if recorded is None:
            logits = self._forward(layout.views(buffer, self.seats))
        else:
            recorded.recording.replay()
            logits = recorded.recording.output
        return logits[: len(step.logit_rows)]

    def _find(self, step: HostStep, single: bool) -> _Recorded | None:
        """The smallest bucket that holds ``step``."""
        tokens, rows = int(step.row_starts[-1]), len(step.seats)
        rows = max(rows, len(step.logit_rows))
        for recorded in self._recorded:
            bucket = recorded.bucket
            if bucket.single == single and bucket.tokens >= tokens and bucket.rows >= rows:
                return recorded
        return None

    def _copy(self, layout: Layout, buffer: torch.Tensor, step: HostStep) -> None:
        """Queue the copy of the step's tables into ``buffer``."""
        turn = self._turn = (self._turn + 1) % HOST_BUFFERS
        copied = self._copied[turn]
        if copied is not None:
            copied.synchronize()
        if len(self._hosts[turn]) < layout.nbytes:
            self._hosts[turn] = host_bytes(2 * layout.nbytes, self.device)
        host = self._hosts[turn]
        layout.fill(host.numpy(), step, *self.seats.known_ids(step))
        buffer[: layout.nbytes].copy_(host[: layout.nbytes], non_blocking=True)
        if self.device.type == "cuda":
            if copied is None:
                copied = self._copied[turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(main_stream(self.device))

    def _memory(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0


def _nothing() -> HostStep:
    """A step of padding alone."""
    none = np.zeros(0, np.int64)
    return HostStep(none, none, none, none, np.zeros(1, np.int64), none, none, none, none, none)


def _mark(device: torch.device) -> torch.cuda.Event:
    mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    mark.record(main_stream(device))
    return mark


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
