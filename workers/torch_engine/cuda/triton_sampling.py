"""The draw on a GPU: one program a row, from logits as the model wrote them to a token id (draw.py says what is drawn).

A row is read a few times while it stays in the cache; nothing of its size is written. One launch serves every kind of
sampling and of constraint: what a row asks for is in a table, so there is nothing to compile when a request is the
first to ask for it, and a row's token depends on its own logits and its own numbers, never on the rows beside it. The
same launch says whether a row's logits are numbers, and keeps the token as its seat's next input.

Thresholds (top_k: the k-th largest weight; top_p: the smallest weight of the nucleus) are searched, not sorted for:
positive floats order as their bits do, so the interval of bit patterns is cut into eight until it holds one pattern.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from workers.masks import StepMasks
from workers.torch_engine.draw import OwnDraw, uniforms
from workers.torch_engine.staging import to_device

BLOCK = 4096  # with 16 warps the quickest on an H100: 0.45 ms for top_p of 128 rows of 128k (2048 and 8: 0.58)
WARPS = 16
PASSES = 11  # eighths of 2**31 patterns, until one is left
# One row of the table, 4 bytes each. ``mask``: row of the masks, -1: none. ``seat``: -1: no token is kept.
ROW = np.dtype(
    [
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("uniform", "<f4"),
        ("top_k", "<i4"),
        ("mask", "<i4"),
        ("seat", "<i4"),
        ("unused", "<i4"),
    ]
)


@triton.jit
def _allowed(bits, mask, words, ids, size):
    """Which of ``ids`` exist and are not ruled out."""
    held = tl.where(mask >= 0, words, 0)
    every = tl.where(mask >= 0, 0, 1)
    word = tl.load(bits + tl.maximum(mask, 0).to(tl.int64) * words + (ids >> 5), mask=(ids >> 5) < held, other=0)
    return (ids < size) & ((((word >> (ids & 31)) & 1) | every) == 1)


@triton.jit
def _weights(logits, bits, mask, words, ids, size, largest, scale):
    """exp2((logit - largest) * scale), zero for what is ruled out: the largest weight is 1."""
    allowed = _allowed(bits, mask, words, ids, size)
    value = tl.load(logits + ids, mask=allowed, other=float("-inf")).to(tl.float32)
    return tl.where(allowed, tl.exp2((value - largest) * scale), 0.0)


@triton.jit(do_not_specialize=["words"])  # one kernel, with masks and without
def draw_rows(
    logits, table, bits, tokens, finite, last_id, row_stride, size, words,
    BLOCK: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """Grid (rows). ``table`` int32 [rows, 8]: ROW; ``bits`` int32 [masks, words]; ``tokens`` int64 [rows]; ``finite``
    int8 [rows]: whether the largest of all logits of the row is a number; ``last_id`` int64 [seats]."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    own = table + row * 8
    temperature = tl.load(own).to(tl.float32, bitcast=True)
    top_p = tl.load(own + 1).to(tl.float32, bitcast=True)
    min_p = tl.load(own + 2).to(tl.float32, bitcast=True)
    uniform = tl.load(own + 3).to(tl.float32, bitcast=True)
    top_k = tl.load(own + 4)
    mask = tl.load(own + 5)
    seat = tl.load(own + 6)
    at = tl.arange(0, BLOCK)

    most = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    some = tl.zeros([BLOCK], tl.int32)  # 1: a number that is not -inf, 2 and above: NaN or inf
    for start in range(0, size, BLOCK):
        value = tl.load(logits + start + at, mask=start + at < size, other=float("-inf")).to(tl.float32)
        some = tl.maximum(some, (value > float("-inf")).to(tl.int32))
        some = tl.maximum(some, ((value != value) | (value == float("inf"))).to(tl.int32) * 2)
        value = tl.where(_allowed(bits, mask, words, start + at, size), value, float("-inf"))
        where = tl.where(value > most, start + at, where)
        most = tl.maximum(most, value)
    tl.store(finite + row, (tl.max(some, 0) == 1).to(tl.int8))
    largest = tl.max(most, 0)
    best = tl.min(tl.where(most == largest, where, 0x7FFFFFFF), 0)  # of equals the first
    if (temperature <= 0) | (tl.abs(largest) == float("inf")):  # greedy, or a row whose token is not used
        greedy = tl.where(best < size, best, 0).to(tl.int64)
        tl.store(tokens + row, greedy)
        tl.store(last_id + seat, greedy, mask=seat >= 0)
        return

    scale = 1.4426950408889634 / temperature
    least = tl.zeros([1], tl.float32) + min_p  # weights below are out
    for stage in range(2):  # top_k, then top_p of what it left
        asked = (stage == 0) & (top_k > 0) & (top_k < size) | (stage == 1) & (top_p < 1.0)
        if asked:
            goal = tl.zeros([1], tl.float32) + top_k.to(tl.float32)
            if stage == 1:
                mass = tl.zeros([BLOCK], tl.float32)
                for start in range(0, size, BLOCK):
                    w = _weights(logits, bits, mask, words, start + at, size, largest, scale)
                    mass += tl.where(w >= least, w, 0.0)
                goal = top_p * tl.sum(mass, 0) + tl.zeros([1], tl.float32)
            low = least.to(tl.int32, bitcast=True)
            high = tl.full([1], 0x3F800001, tl.int32)  # above the bits of 1.0
            for _ in range(PASSES):
                if tl.max(high - low, 0) > 1:
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
                        w = _weights(logits, bits, mask, words, start + at, size, largest, scale)
                        counted = tl.where(stage == 0, tl.where(w > 0, 1.0, 0.0), w)
                        s1 += tl.where(w >= t1, counted, 0.0)
                        s2 += tl.where(w >= t2, counted, 0.0)
                        s3 += tl.where(w >= t3, counted, 0.0)
                        s4 += tl.where(w >= t4, counted, 0.0)
                        s5 += tl.where(w >= t5, counted, 0.0)
                        s6 += tl.where(w >= t6, counted, 0.0)
                        s7 += tl.where(w >= t7, counted, 0.0)
                    enough = (tl.sum(s1, 0) >= goal).to(tl.int32) + (tl.sum(s2, 0) >= goal).to(tl.int32)
                    enough += (tl.sum(s3, 0) >= goal).to(tl.int32) + (tl.sum(s4, 0) >= goal).to(tl.int32)
                    enough += (tl.sum(s5, 0) >= goal).to(tl.int32) + (tl.sum(s6, 0) >= goal).to(tl.int32)
                    enough += (tl.sum(s7, 0) >= goal).to(tl.int32)
                    low = low + step * enough
                    high = tl.minimum(high, low + step)
            least = low.to(tl.float32, bitcast=True)

    total = tl.zeros([], tl.float32)
    for start in range(0, size, BLOCK):
        w = _weights(logits, bits, mask, words, start + at, size, largest, scale)
        total += tl.sum(tl.where(w >= least, w, 0.0), 0)
    # Sums are taken twice in the same order, so a target below the total is found, but for rounding within a block.
    target = uniform * total
    before = tl.zeros([], tl.float32)
    drawn = tl.full([], -1, tl.int32)
    last = best
    for start in range(0, size, BLOCK):
        if drawn < 0:
            w = _weights(logits, bits, mask, words, start + at, size, largest, scale)
            w = tl.where(w >= least, w, 0.0)
            held = tl.sum(w, 0)
            reached = before + tl.cumsum(w, 0) > target
            first = tl.min(tl.where(reached & (w > 0), start + at, 0x7FFFFFFF), 0)
            end = tl.max(tl.where(w > 0, start + at, -1), 0)
            last = tl.where(end >= 0, end, last)
            if before + held > target:
                drawn = tl.minimum(first, last)
            before += held
    drawn = tl.where(drawn < 0, last, drawn)
    found = tl.where(drawn < size, drawn, 0).to(tl.int64)
    tl.store(tokens + row, found)
    tl.store(last_id + seat, found, mask=seat >= 0)


class TritonDraw:
    """A sampler's draw (draw.py) as one launch, masks of constrained rows included."""

    takes_masks = True

    def __init__(self) -> None:
        self.last_id: torch.Tensor | None = None  # int64 [seats], where ``of_model`` keeps what it drew

    def __call__(
        self, logits: torch.Tensor, fields: np.ndarray, positions: np.ndarray, masks: StepMasks | None = None
    ) -> torch.Tensor:
        return self._launch(logits, fields, positions, masks, None)[0]

    def of_model(
        self, logits: torch.Tensor, fields: np.ndarray, positions: np.ndarray, masks: StepMasks | None,
        seats: np.ndarray,
    ) -> OwnDraw:  # fmt: skip
        return OwnDraw(*self._launch(logits, fields, positions, masks, seats), self.last_id is not None)

    def _launch(
        self, logits: torch.Tensor, fields: np.ndarray, positions: np.ndarray, masks: StepMasks | None,
        seats: np.ndarray | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        table = np.zeros(len(fields), ROW)
        for name in ("temperature", "top_p", "min_p", "top_k"):
            table[name] = fields[name]
        if (fields["temperature"] > 0).any():
            table["uniform"] = uniforms(fields["key"], positions)
        table["mask"] = -1
        table["seat"] = -1 if seats is None or self.last_id is None else seats
        packed = NO_MASKS
        if masks is not None and len(masks.rows):
            table["mask"][masks.rows] = np.arange(len(masks.rows))
            packed = masks.bits
        device = logits.device
        bits = _no_masks(device) if packed is NO_MASKS else to_device(packed, device)
        return launch_draw(logits, to_device(table.view("<i4"), device), bits, self.last_id)


NO_MASKS = np.zeros((1, 1), np.int32)


@cache
def _no_masks(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(NO_MASKS).to(device)


def launch_draw(
    logits: torch.Tensor, table: torch.Tensor, bits: torch.Tensor, last_id: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [rows], bool [rows]: finite) from ``logits`` [rows, size] of any float kind; ``table`` and ``bits`` as
    draw_rows has them."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    finite = torch.empty(len(logits), dtype=torch.int8, device=logits.device)
    draw_rows[(len(logits),)](
        logits, table, bits, tokens, finite, tokens if last_id is None else last_id,
        logits.stride(0), logits.shape[1], bits.shape[1], BLOCK=BLOCK, PASSES=PASSES, num_warps=WARPS,
    )  # fmt: skip
    return tokens, finite.view(torch.bool)
