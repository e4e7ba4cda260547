"""The KV pool: where the keys and values of all running sequences lie, in blocks, layer by layer.

The scheduler owns the accounting (which sequence has which block); the pool is only memory, and how keys and
values lie in it is the attention's. Block b holds slots b * block_size to (b + 1) * block_size - 1.
One block more than is offered lies at the end: slot -1, where padding may be written, is its last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from protocol.errors import StartError

_LINE = 64  # bytes of a cache line, on which tensors begin


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer stores per token. Key and value heads may differ in size (deepseek-v3)."""

    kv_heads: int
    key_size: int
    value_size: int

    @property
    def numbers(self) -> int:
        return self.kv_heads * (self.key_size + self.value_size)


class KVPool:
    """``keys[layer]``: [slots, kv_heads, key_size], ``values[layer]``: [slots, kv_heads, value_size]."""

    def __init__(
        self,
        shapes: list[LayerShape],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        panel: int = 1,
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        slots = (blocks + 1) * rounded(block_size, panel)
        # Zeros, not empty: a masked-out slot is multiplied by zero, and zero times NaN is NaN.
        self.keys = [_zeros((slots, s.kv_heads, s.key_size), dtype, device) for s in shapes]
        self.values = [_zeros((slots, s.kv_heads, s.value_size), dtype, device) for s in shapes]

    @torch.inference_mode()
    def zero_(self) -> None:
        for tensor in (*self.keys, *self.values):
            tensor.zero_()


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU ones that take memory only where they are written (calloc), so a large pool starts at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)


def rounded(block_size: int, panel: int) -> int:
    """Slots that a block takes up where it consists of whole panels."""
    return -(-block_size // panel) * panel


def block_bytes(shapes: list[LayerShape], block_size: int, dtype: torch.dtype, panel: int = 1) -> int:
    """Bytes of one block over all layers."""
    return rounded(block_size, panel) * sum(shape.numbers for shape in shapes) * dtype.itemsize


def blocks_within(budget: int, per_block: int, block_size: int, most_tokens: int) -> int:
    """Blocks that ``budget`` bytes hold, the padding block not counted, and no more than ``most_tokens`` ever need."""
    blocks = min(budget // per_block - 1, -(-most_tokens // block_size))
    if blocks < 1:
        raise StartError(
            f"the KV cache needs at least {2 * per_block} bytes (two blocks of {block_size} tokens) "
            f"but has {budget}: raise --kv-cache-memory or lower --block-size"
        )
    return blocks
