"""The nucleus of top-p on a GPU: its smallest weight, found in a dozen passes over a row that stays in the cache.

Positive floats order as their bits do, so the interval of bit patterns is cut into eight until it holds one: exact, and
the vocabulary is never sorted. torch's own way to the same number takes 31 halvings of three launches each.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 2048
PASSES = 11  # eighths of 2**31 patterns, until one is left


@triton.jit
def nucleus_rows(weights, goals, thresholds, row_stride, size, BLOCK: tl.constexpr, PASSES: tl.constexpr):
    """Grid (rows). The largest t with sum(weights >= t) >= goal; sum(weights >= low) >= goal holds throughout."""
    row = tl.program_id(0).to(tl.int64)
    base = weights + row * row_stride
    goal = tl.load(goals + row)
    at = tl.arange(0, BLOCK)
    most = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        most = tl.maximum(most, tl.load(base + start + at, mask=start + at < size, other=0.0))
    low = tl.zeros([1], tl.int32)
    high = tl.max(most, 0).to(tl.int32, bitcast=True) + 1 + low
    for _ in range(PASSES):
        step = tl.maximum((high - low + 7) // 8, 1)
        t1 = (low + step).to(tl.float32, bitcast=True)
        t2 = (low + step * 2).to(tl.float32, bitcast=True)
        t3 = (low + step * 3).to(tl.float32, bitcast=True)
        t4 = (low + step * 4).to(tl.float32, bitcast=True)
        t5 = (low + step * 5).to(tl.float32, bitcast=True)
        t6 = (low + step * 6).to(tl.float32, bitcast=True)
        t7 = (low + step * 7).to(tl.float32, bitcast=True)
        s1 = tl.zeros([BLOCK], tl.float32)
        s2 = tl.zeros([BLOCK], tl.float32)
        s3 = tl.zeros([BLOCK], tl.float32)
        s4 = tl.zeros([BLOCK], tl.float32)
        s5 = tl.zeros([BLOCK], tl.float32)
        s6 = tl.zeros([BLOCK], tl.float32)
        s7 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            w = tl.load(base + start + at, mask=start + at < size, other=0.0)
            s1 += tl.where(w >= t1, w, 0.0)
            s2 += tl.where(w >= t2, w, 0.0)
            s3 += tl.where(w >= t3, w, 0.0)
            s4 += tl.where(w >= t4, w, 0.0)
            s5 += tl.where(w >= t5, w, 0.0)
            s6 += tl.where(w >= t6, w, 0.0)
            s7 += tl.where(w >= t7, w, 0.0)
        enough = (tl.sum(s1, 0) >= goal).to(tl.int32) + (tl.sum(s2, 0) >= goal).to(tl.int32)
        enough += (tl.sum(s3, 0) >= goal).to(tl.int32) + (tl.sum(s4, 0) >= goal).to(tl.int32)
        enough += (tl.sum(s5, 0) >= goal).to(tl.int32) + (tl.sum(s6, 0) >= goal).to(tl.int32)
        enough += (tl.sum(s7, 0) >= goal).to(tl.int32)
        low = low + step * enough
        high = tl.minimum(high, low + step)
    tl.store(thresholds + row + tl.zeros([1], tl.int32), low.to(tl.float32, bitcast=True))


def nucleus_threshold(weights: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """float32 [k, 1]: the largest t with sum(weights >= t) >= goal. ``weights`` float32 [k, vocabulary], none negative;
    ``goal`` [k, 1]."""
    if weights.stride(1) != 1:
        weights = weights.contiguous()
    thresholds = torch.empty(len(weights), 1, dtype=torch.float32, device=weights.device)
    nucleus_rows[(len(weights),)](
        weights, goal.contiguous(), thresholds, weights.stride(0), weights.shape[1],
        BLOCK=BLOCK, PASSES=PASSES, num_warps=8,
    )  # fmt: skip
    return thresholds
