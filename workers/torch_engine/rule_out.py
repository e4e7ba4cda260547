"""What a grammar rules out leaves the logits: in place, in the rows of constrained sequences alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from workers.masks import StepMasks
from workers.torch_engine.inputs import to_device

RuleOut = Callable[[torch.Tensor, StepMasks], None]


def rule_out(logits: torch.Tensor, masks: StepMasks) -> None:
    """Write minus infinity where a row of ``masks`` has no bit, and beyond its bits, into that row of ``logits``."""
    if not len(masks.rows):
        return
    bits = masks.bits
    size = min(logits.shape[-1], 32 * bits.shape[1])
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        of_rows = logits.numpy()
        ruled_out = np.unpackbits((~bits).view(np.uint8), axis=1, count=size, bitorder="little").view(bool)
        for row, out in zip(masks.rows.tolist(), ruled_out, strict=True):
            np.putmask(of_rows[row, :size], out, -np.inf)
            of_rows[row, size:] = -np.inf
        return
    device = logits.device
    words, rows = to_device(bits, device), to_device(masks.rows, device)
    ids = torch.arange(size, device=device)
    own = logits[rows]
    own[:, :size].masked_fill_((words[:, ids >> 5] >> (ids & 31)) & 1 == 0, -torch.inf)
    own[:, size:] = -torch.inf
    logits.index_copy_(0, rows, own)
