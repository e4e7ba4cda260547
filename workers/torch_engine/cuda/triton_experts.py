"""Mixture-of-experts on a GPU in four launches whose shapes depend on the bucket alone, so that graphs can record them.

A *pair* is one token and one of the experts that it chose. Pairs are ordered by expert on the device, each expert's in
*blocks* of a fixed number of rows that the last one fills up with nothing; there are never more blocks than the bucket
of tokens allows, and those that are not needed return at once. No count is read by the host, and an expert's weights
are read only if a token chose it. Padding tokens choose none.

Before these, a router's choice is one launch too, where the model chooses by softmax (choose_rows).

1. place_pairs: each expert's program counts all pairs, knows from that where its blocks begin, and lists its own pairs
   there, in the order of tokens.
2. gate_up_blocks: the block's rows times gate and up, the activation behind it.
3. down_blocks.
4. sum_choices: a token's results weighed and added in the order of choice, so that a row does not depend on others.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

SILU, GELU_TANH, CLAMPED = 0, 1, 2  # CLAMPED: gpt-oss's
MOST_EXPERTS = 1024  # of a layer, that one program of choose_experts holds
SCAN = 256  # pairs that a program of place_pairs looks at at once


@triton.jit
def choose_rows(
    logits, chosen, weights, row_stride,
    EXPERTS: tl.constexpr, EXPERTS_P2: tl.constexpr, CHOICES: tl.constexpr, CHOICES_P2: tl.constexpr,
    AMONG_CHOSEN: tl.constexpr,
):  # fmt: skip
    """Grid (tokens): the CHOICES largest of a row, the largest first, with their softmax over all experts or, where
    AMONG_CHOSEN, over these."""
    token = tl.program_id(0).to(tl.int64)
    at, nth = tl.arange(0, EXPERTS_P2), tl.arange(0, CHOICES_P2)
    value = tl.load(logits + token * row_stride + at, mask=at < EXPERTS, other=float("-inf")).to(tl.float32)
    largest = tl.max(value, 0)
    total = tl.sum(tl.where(at < EXPERTS, tl.exp(value - largest), 0.0), 0)
    ids = tl.zeros([CHOICES_P2], tl.int32)
    picked = tl.zeros([CHOICES_P2], tl.float32)
    for choice in range(CHOICES):
        best = tl.max(value, 0)
        expert = tl.minimum(tl.min(tl.where(value == best, at, EXPERTS - 1), 0), EXPERTS - 1)  # of equals the first
        ids = tl.where(nth == choice, expert, ids)
        picked = tl.where(nth == choice, tl.exp(best - largest), picked)
        value = tl.where(at == expert, float("-inf"), value)
    if AMONG_CHOSEN:
        total = tl.sum(picked, 0)
    tl.store(chosen + token * CHOICES + nth, ids.to(tl.int64), mask=nth < CHOICES)
    tl.store(weights + token * CHOICES + nth, (picked / total).to(weights.dtype.element_ty), mask=nth < CHOICES)


@triton.jit(do_not_specialize=["pairs", "blocks_most"])  # one kernel for all buckets, but for ROWS
def place_pairs(
    chosen, slots, order, expert_of, pairs, blocks_most,
    CHOICES: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr,
    SCAN: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (experts + 1): the last program marks the blocks that are not needed.

    ``chosen`` int64 [pairs]; ``slots`` int64 [tokens], negative for padding where PADDED. ``order`` int32
    [blocks_most * ROWS]: the pair of each row, -1 for none; ``expert_of`` int32 [blocks_most], -1 for none.
    """
    own = tl.program_id(0)
    bins, at = tl.arange(0, BINS), tl.arange(0, SCAN)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, pairs, SCAN):
        pair = start + at
        expert = tl.load(chosen + pair, mask=pair < pairs, other=EXPERTS).to(tl.int32)
        if PADDED:
            slot = tl.load(slots + pair // CHOICES, mask=pair < pairs, other=-1)
            expert = tl.where(slot < 0, EXPERTS, expert)
        expert = tl.where((expert < 0) | (expert > EXPERTS), EXPERTS, expert)
        counts += tl.histogram(expert, BINS)
    blocks = tl.where(bins < EXPERTS, (counts + ROWS - 1) // ROWS, 0)
    first = tl.sum(tl.where(bins < own, blocks, 0), 0)
    if own == EXPERTS:
        for block in range(first, blocks_most):
            tl.store(expert_of + block, -1)
        return
    held = tl.sum(tl.where(bins == own, blocks, 0), 0)
    row = tl.arange(0, ROWS)
    for block in range(first, first + held):
        tl.store(expert_of + block, own)
    placed = tl.sum(tl.where(bins == own, counts, 0), 0)
    if held > 0:  # what the last block has beyond the expert's pairs
        rest = (held - 1) * ROWS + row
        tl.store(order + first * ROWS + rest, tl.zeros([ROWS], tl.int32) - 1, mask=rest >= placed)
        before = tl.zeros([], tl.int32)
        for start in range(0, pairs, SCAN):
            pair = start + at
            expert = tl.load(chosen + pair, mask=pair < pairs, other=EXPERTS).to(tl.int32)
            if PADDED:
                slot = tl.load(slots + pair // CHOICES, mask=pair < pairs, other=-1)
                expert = tl.where(slot < 0, EXPERTS, expert)
            mine = (expert == own).to(tl.int32)
            rank = before + tl.cumsum(mine, 0) - mine
            tl.store(order + first * ROWS + rank, pair, mask=mine == 1)
            before += tl.sum(mine, 0)


@triton.jit
def tile_of(order, block, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of this program: pairs [ROWS], which of them are real, output columns [COLUMNS], which of them exist."""
    pair = tl.load(order + block * ROWS + tl.arange(0, ROWS))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return pair, pair >= 0, column, column < OUTPUTS


@triton.jit
def gate_up_blocks(
    x, weight, bias, hidden, order, expert_of,
    x_row, w_expert, w_out, w_in, b_expert, up_at, limit, alpha,
    CHOICES: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, EVERY: tl.constexpr, BIAS: tl.constexpr,
    ACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, WIDTH / COLUMNS). ``hidden`` [pairs, WIDTH] of x [tokens, SIZE]; column n of gate is output
    n * EVERY of the weight, that of up ``up_at`` further."""
    block = tl.program_id(0)
    expert = tl.load(expert_of + block)
    if expert < 0:
        return
    pair, real, column, there = tile_of(order, block, WIDTH, ROWS, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_at = x + (tl.maximum(pair, 0) // CHOICES).to(tl.int64)[:, None] * x_row + depth[None, :]
    w_at = weight + expert.to(tl.int64) * w_expert + (column * EVERY).to(tl.int64)[None, :] * w_out
    w_at += depth[:, None] * w_in
    up_step = up_at * w_out
    gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, SIZE, DEPTH):
        inside = start + depth < SIZE
        a = tl.load(x_at, mask=real[:, None] & inside[None, :], other=0.0)
        g = tl.load(w_at, mask=inside[:, None] & there[None, :], other=0.0)
        u = tl.load(w_at + up_step, mask=inside[:, None] & there[None, :], other=0.0)
        gate = tl.dot(a, g, gate, input_precision="ieee")
        up = tl.dot(a, u, up, input_precision="ieee")
        x_at += DEPTH
        w_at += DEPTH * w_in
    if BIAS:
        b_at = bias + expert.to(tl.int64) * b_expert + column * EVERY
        gate += tl.load(b_at, mask=there, other=0.0).to(tl.float32)[None, :]
        up += tl.load(b_at + up_at, mask=there, other=0.0).to(tl.float32)[None, :]
    kind = hidden.dtype.element_ty
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)  # as a product of its own would leave them
    if ACT == 0:
        y = gate
    elif ACT == 1:  # 0.5 * (1 + tanh(y)) is the logistic function of 2y
        y = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        y = gate * alpha
    out = gate / (1.0 + tl.exp(tl.minimum(-y, 80.0))) * up
    h_at = hidden + tl.maximum(pair, 0).to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(h_at, out.to(kind), mask=real[:, None] & there[None, :])


@triton.jit
def down_blocks(
    hidden, weight, bias, out, order, expert_of,
    w_expert, w_out, w_in, b_expert,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, SIZE / COLUMNS). ``out`` [pairs, SIZE] of ``hidden`` [pairs, WIDTH]."""
    block = tl.program_id(0)
    expert = tl.load(expert_of + block)
    if expert < 0:
        return
    pair, real, column, there = tile_of(order, block, SIZE, ROWS, COLUMNS)
    depth = tl.arange(0, DEPTH)
    h_at = hidden + tl.maximum(pair, 0).to(tl.int64)[:, None] * WIDTH + depth[None, :]
    w_at = weight + expert.to(tl.int64) * w_expert + column.to(tl.int64)[None, :] * w_out + depth[:, None] * w_in
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, WIDTH, DEPTH):
        inside = start + depth < WIDTH
        a = tl.load(h_at, mask=real[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at, mask=inside[:, None] & there[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee")
        h_at += DEPTH
        w_at += DEPTH * w_in
    if BIAS:
        acc += tl.load(bias + expert.to(tl.int64) * b_expert + column, mask=there, other=0.0).to(tl.float32)[None, :]
    o_at = out + tl.maximum(pair, 0).to(tl.int64)[:, None] * SIZE + column[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=real[:, None] & there[None, :])


@triton.jit
def sum_choices(
    results, chosen, weights, slots, out, w_token, w_choice,
    CHOICES: tl.constexpr, EXPERTS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, SIZE / BLOCK). Zeros for padding, and for choices that name no expert."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = SIZE
    if PADDED:
        here = tl.where(tl.load(slots + token) >= 0, SIZE, 0)
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in range(CHOICES):
        expert = tl.load(chosen + token * CHOICES + choice)
        held = tl.where((expert >= 0) & (expert < EXPERTS), here, 0)
        weight = tl.load(weights + token * w_token + choice * w_choice).to(tl.float32)
        value = tl.load(results + (token * CHOICES + choice) * SIZE + at, mask=at < held, other=0.0)
        acc += tl.where(at < held, weight * value.to(tl.float32), 0.0)
    tl.store(out + token * SIZE + at, acc.to(out.dtype.element_ty), mask=at < SIZE)


def choose_experts(
    logits: torch.Tensor, choices: int, among_chosen: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen int64 [T, choices], weights [T, choices] of ``dtype``) from a router's ``logits`` [T, experts]."""
    tokens, experts = logits.shape
    chosen = torch.empty(tokens, choices, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, choices, dtype=dtype, device=logits.device)
    choose_rows[(tokens,)](
        logits, chosen, weights, logits.stride(0),
        EXPERTS=experts, EXPERTS_P2=triton.next_power_of_2(experts),
        CHOICES=choices, CHOICES_P2=triton.next_power_of_2(choices), AMONG_CHOSEN=among_chosen, num_warps=4,
    )  # fmt: skip
    return chosen, weights


def gate_up_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act: int) -> torch.Tensor:
    """act(gate) * up [T, width] of x [T, C] in one launch, by the product of one expert's block: for few rows, whose
    time is that of reading ``weight`` [2 width, C]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    tokens, size = x.shape
    width = len(weight) // 2
    rows = max(16, triton.next_power_of_2(tokens))
    order, expert_of = _one_block(tokens, rows, x.device)
    hidden = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    columns, depth, stages = tiles(rows, x.element_size())
    gate_up_blocks[(1, triton.cdiv(width, columns))](
        x, weight, weight if bias is None else bias, hidden, order, expert_of,
        x.stride(0), 0, weight.stride(0), weight.stride(1), 0, width, 0.0, 0.0,
        CHOICES=1, SIZE=size, WIDTH=width, EVERY=1, BIAS=bias is not None, ACT=act,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return hidden


@cache
def _one_block(tokens: int, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of a block that holds ``tokens`` rows as they are. Made before a graph is recorded, and kept."""
    order = torch.arange(rows, dtype=torch.int32)
    order[tokens:] = -1
    return order.to(device), torch.zeros(1, dtype=torch.int32, device=device)


def rows_of_block(pairs: int, experts: int, itemsize: int) -> int:
    """Rows of a block: about what an expert gets of ``pairs``. float32 has no matrix unit: larger tiles would spill."""
    wanted = triton.next_power_of_2(max(1, pairs // experts))
    return max(16, min(64 if itemsize == 2 else 16, wanted))


def tiles(rows: int, itemsize: int) -> tuple[int, int, int]:
    """Columns and depth of a round, and rounds in flight. Few rows: the weights' way matters, so many are on it."""
    if itemsize == 4:
        return 32, 32, 2
    return (32, 128, 4) if rows == 16 else (64, 64, 3)


def most_blocks(pairs: int, experts: int, rows: int) -> int:
    """sum(ceil(count / rows)) over the experts that were chosen, at most."""
    return min(pairs, pairs // rows + min(experts, pairs))


def experts_sum(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor,
    gate_up: torch.Tensor, gate_up_bias: torch.Tensor | None, down: torch.Tensor, down_bias: torch.Tensor | None,
    act: int, *, interleaved: bool = False, limit: float = 0.0, alpha: float = 0.0, slots: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """[T, C]: for each token of ``x`` [T, C] the results of its experts, weighed by ``weights`` [T, k] and added.

    ``chosen`` int64 [T, k]. ``gate_up`` [experts, 2 width, C] and ``down`` [experts, C, width], of any strides; biases
    [experts, outputs]. ``interleaved``: gate and up take turns in the outputs. ``slots`` [T]: negative for padding.
    """
    tokens, choices = chosen.shape
    experts, size, width = down.shape
    pairs = tokens * choices
    x, chosen = x if x.stride(1) == 1 else x.contiguous(), chosen.contiguous()
    out = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    rows = rows_of_block(pairs, experts, x.element_size())
    blocks = most_blocks(pairs, experts, rows)
    order = torch.empty(blocks * rows, dtype=torch.int32, device=x.device)
    expert_of = torch.empty(blocks, dtype=torch.int32, device=x.device)
    given, padded = (slots, True) if slots is not None else (chosen, False)  # a pointer is asked for; it is not read
    place_pairs[(experts + 1,)](
        chosen, given, order, expert_of, pairs, blocks,
        CHOICES=choices, EXPERTS=experts, BINS=triton.next_power_of_2(experts + 1), ROWS=rows,
        SCAN=SCAN, PADDED=padded, num_warps=4,
    )  # fmt: skip
    hidden, results = (torch.empty(pairs, n, dtype=x.dtype, device=x.device) for n in (width, size))
    columns, depth, stages = tiles(rows, x.element_size())
    gate_up_blocks[(blocks, triton.cdiv(width, columns))](
        x, gate_up, gate_up if gate_up_bias is None else gate_up_bias, hidden, order, expert_of,
        x.stride(0), gate_up.stride(0), gate_up.stride(1), gate_up.stride(2),
        0 if gate_up_bias is None else gate_up_bias.stride(0), 1 if interleaved else width, limit, alpha,
        CHOICES=choices, SIZE=size, WIDTH=width, EVERY=2 if interleaved else 1, BIAS=gate_up_bias is not None, ACT=act,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=4, num_stages=stages,
    )  # fmt: skip
    down_blocks[(blocks, triton.cdiv(size, columns))](
        hidden, down, down if down_bias is None else down_bias, results, order, expert_of,
        down.stride(0), down.stride(1), down.stride(2), 0 if down_bias is None else down_bias.stride(0),
        SIZE=size, WIDTH=width, BIAS=down_bias is not None,
        ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=4, num_stages=stages,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(size))
    sum_choices[(tokens, triton.cdiv(size, block))](
        results, chosen, weights, given, out, weights.stride(0), weights.stride(1),
        CHOICES=choices, EXPERTS=experts, SIZE=size, BLOCK=block, PADDED=padded, num_warps=4,
    )  # fmt: skip
    return out
