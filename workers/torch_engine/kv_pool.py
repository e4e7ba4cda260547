"""The KV pool: where the keys and values of all running sequences lie, in blocks, layer by layer; and host memory
behind it.

The scheduler owns the accounting (which sequence has which block); the pool is only memory, and how keys and
values lie in it is the attention's. Block b holds slots b * block_size to (b + 1) * block_size - 1.
One block more than is offered lies at the end: slot -1, where padding may be written, is its last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from protocol.errors import EngineFailed, StartError
from protocol.messages import Plan, PoolCapacity

if TYPE_CHECKING:
    from workers.torch_engine.inputs import SampledRows

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

    def parts(self) -> list[torch.Tensor]:
        """uint8 [blocks, bytes] each: what a block has in each of the tensors, keys first. Views."""
        tensors = (*self.keys, *self.values)
        return [tensor.view(self.blocks + 1, -1).view(torch.uint8)[: self.blocks] for tensor in tensors]

    @torch.inference_mode()
    def zero_(self) -> None:
        for tensor in (*self.keys, *self.values):
            tensor.zero_()


class HostPool:
    """``blocks`` of host memory behind ``pool``, where its prefix cache goes on (``--kv-offload``).

    The scheduler owns the accounting here too: a plan names what is copied out of the pool and into it. A host block
    lies in one piece, the parts of all layers one after another, as bytes.

    These copies are made where the steps run, before them, which is right on a CPU: it is the same memory.
    cuda/host_copies.py copies beside the steps.
    """

    def __init__(self, pool: KVPool, blocks: int) -> None:
        self.pool, self.blocks = pool, blocks
        self.parts = pool.parts()
        self._take_memory()

    def _take_memory(self) -> None:
        self.memory = lazy_zeros(self.blocks * self.block_bytes).view(self.blocks, self.block_bytes)

    @property
    def block_bytes(self) -> int:
        return sum(part.shape[1] for part in self.parts)

    @property
    def capacity(self) -> PoolCapacity:
        return PoolCapacity("host", self.pool.block_size, self.blocks, self.copy_us())

    def copy_us(self) -> float:
        """Microseconds that a block takes to be copied in beside steps; 0: they are not beside it."""
        return 0.0

    def follow(self, plan: Plan) -> None:
        """Make the copies of ``plan``, whose rows are computed next. EngineFailed where it names what is not there."""
        if plan.copies_out:
            blocks, hosts = self._pairs(plan.copies_out, self.pool.blocks, self.blocks)
            self._copy_out(blocks, hosts)
        if plan.copies_in:
            hosts, blocks = self._pairs(plan.copies_in, self.blocks, self.pool.blocks)
            self._copy_in(hosts, blocks)

    def await_blocks(self, step: SampledRows) -> None:
        """The rows of ``step`` are queued next: nothing of it may run before copies of its blocks."""

    def _copy_out(self, blocks: np.ndarray, hosts: np.ndarray) -> None:
        for place, part in self._places():
            read = part.index_select(0, torch.from_numpy(blocks).to(part.device))
            place.index_copy_(0, torch.from_numpy(hosts), read.cpu())

    def _copy_in(self, hosts: np.ndarray, blocks: np.ndarray) -> None:
        for place, part in self._places():
            read = place.index_select(0, torch.from_numpy(hosts)).to(part.device)
            part.index_copy_(0, torch.from_numpy(blocks).to(part.device), read)

    def _places(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(its place in all host blocks, the part): uint8 [host blocks, n] and [blocks, n]."""
        widths = [part.shape[1] for part in self.parts]
        return list(zip(torch.split(self.memory, widths, dim=1), self.parts, strict=True))

    @staticmethod
    def _pairs(packed: bytes, sources: int, targets: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] each."""
        ids = np.frombuffer(packed, "<i4").astype(np.int64).reshape(-1, 2)
        if (ids < 0).any() or (ids >= (sources, targets)).any() or len(np.unique(ids[:, 1])) < len(ids):
            raise EngineFailed("a plan copies blocks that are not there, or two to one place")
        return np.ascontiguousarray(ids[:, 0]), np.ascontiguousarray(ids[:, 1])


def _zeros(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU ones that take memory only where they are written (calloc), so a large pool starts at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return lazy_zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def lazy_zeros(size: int) -> torch.Tensor:
    """uint8 [size] on the host, at the beginning of a cache line."""
    raw = np.zeros(size + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return torch.from_numpy(raw[start : start + size])


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
