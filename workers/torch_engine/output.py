"""What a step gives back: sampled ids on their way from the device to the host."""

from __future__ import annotations

import numpy as np
import torch

from workers.engine import Sampled
from workers.torch_engine.sampler import Drawn


class TorchStepOutput:
    """Holds one step's draws. On a GPU their copy to pinned memory is queued here; ``wait`` awaits it."""

    def __init__(self, seats: np.ndarray, drawn: Drawn, tops: np.ndarray) -> None:
        self.exec_us = 0
        self._seats = seats
        self._tops = tops
        self._lp_rows = drawn.lp_rows
        self._copies = [
            None if tensor is None else _to_host(tensor)
            for tensor in (drawn.tokens, drawn.lp_drawn, drawn.lp_top_ids, drawn.lp_top)
        ]
        self._done: torch.cuda.Event | None = None
        if drawn.tokens.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    @staticmethod
    def empty() -> TorchStepOutput:
        """The output of a step in which no row samples."""
        nobody = np.zeros(0, np.int64)
        return TorchStepOutput(nobody, Drawn(torch.zeros(0, dtype=torch.int64)), nobody)

    def wait(self) -> Sampled:
        """Block until the step's ids are on the host."""
        if self._done is not None:
            self._done.synchronize()
        tokens, drawn, top_ids, top = (None if copy is None else copy.numpy() for copy in self._copies)
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
        return Sampled(self._seats.astype(np.int32), tokens.astype(np.int32), logprobs, self.exec_us)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
