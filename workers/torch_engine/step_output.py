"""What a step gives back: sampled ids on their way from the device to the host, and how long the device took.

On a GPU results travel on a stream of their own, beside the next step rather than before it.
"""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import torch

from workers.engines.base import Sampled
from workers.engines.checks import NON_FINITE, Refusals
from workers.masks import StepMasks
from workers.torch_engine.sampler import Drawn


class StepClock:
    """Device time of one step: from its making to ``stop``. On a GPU both are marks in the stream."""

    def __init__(self, device: torch.device) -> None:
        self._marks = None
        self._took_us = 0
        if device.type == "cuda":
            self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            self._marks[0].record()
        self._began = time.perf_counter()

    def stop(self) -> None:
        """Everything of the step has been queued (GPU) or done (CPU)."""
        self._took_us = int((time.perf_counter() - self._began) * 1e6)
        if self._marks is not None:
            self._marks[1].record()

    def wait(self) -> int:
        """Block until the device is there; microseconds that the step took it."""
        if self._marks is None:
            return self._took_us
        self._marks[1].synchronize()
        return int(self._marks[0].elapsed_time(self._marks[1]) * 1e3)


class TorchStepOutput:
    """Holds one step's draws (None where no row samples). On a GPU their copy to pinned memory is queued here."""

    def __init__(
        self,
        seats: np.ndarray,
        drawn: Drawn | None,
        tops: np.ndarray,
        clock: StepClock,
        refused: Refusals,
        masks: StepMasks | None = None,
    ) -> None:
        self._refused = refused
        self._seats = seats
        self._masks = masks
        self._tops = tops
        self._clock = clock
        self._lp_rows = drawn.lp_rows if drawn else None
        clock.stop()
        results = (drawn.tokens, drawn.lp_drawn, drawn.lp_top_ids, drawn.lp_top, drawn.finite) if drawn else ()
        self._copies, self._copied = _to_host(results)

    def tokens(self) -> np.ndarray:
        """int64 [k]: the ids drawn. Blocks until they are on the host; any thread may ask."""
        if self._copied is not None:
            self._copied.synchronize()
        (tokens, *_) = self._copies
        assert tokens is not None
        return tokens.numpy()

    def wait(self) -> Sampled:
        """Block until the step's ids are on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        exec_us = self._clock.wait()
        if not self._copies:
            none = self._seats.astype(np.int32)
            return Sampled(none, none, {}, exec_us, self._refused.failed, self._refused.dropped)
        tokens, drawn, top_ids, top, finite = (None if copy is None else copy.numpy() for copy in self._copies)
        assert tokens is not None
        logprobs: dict[int, tuple[float, np.ndarray, np.ndarray]] = {}
        if self._lp_rows is not None:
            assert drawn is not None
            assert top_ids is not None
            assert top is not None
            for at, row in enumerate(self._lp_rows):
                asked = int(self._tops[row])
                own = (float(drawn[at]), top_ids[at, :asked].astype(np.int32), top[at, :asked])
                logprobs[int(self._seats[row])] = own
        sampled = Sampled(self._seats.astype(np.int32), tokens.astype(np.int32), logprobs, exec_us)
        assert finite is not None
        if self._refused or not finite.all():
            sampled.failed |= self._refused.failed
            sampled.dropped += self._refused.dropped
            for seat in self._seats[~finite].tolist():
                sampled.failed[seat] = NON_FINITE
                sampled.dropped.append(seat)
        if self._masks is not None:
            sampled.failed |= self._masks.failed
            sampled.mask_us = self._masks.mask_us
            sampled.mask_wait_us = self._masks.wait_us
        return sampled


def _to_host(
    results: tuple[torch.Tensor | None, ...],
) -> tuple[list[torch.Tensor | None], torch.cuda.Event | None]:
    """Copies of ``results`` in host memory, and the mark after which they are there (None: they are)."""
    if not any(tensor is not None and tensor.is_cuda for tensor in results):
        return list(results), None
    stream = _copy_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    copies: list[torch.Tensor | None] = []
    with torch.cuda.stream(stream):
        for tensor in results:
            if tensor is None:
                copies.append(None)
                continue
            tensor.record_stream(stream)  # its memory is not given away before the copy is done
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies.append(host.copy_(tensor, non_blocking=True))
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
    return copies, copied


@cache
def _copy_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
