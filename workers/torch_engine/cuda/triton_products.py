"""Products with quantized weights on a GPU: their numbers are widened in registers, never in memory.

widened_rows: y = x W^T for weights in FP8, int8 or int4, sums in float32. A tile of outputs is the left side of the
product and the rows of x the right one: with few rows, whose time is that of reading the weights, the matrix unit is
used well all the same. Where outputs alone do not keep the device busy, the inputs are cut into pieces too; the last
piece of a tile to be done adds all, in their order. Gate and up may be one launch with the activation behind it.

round_rows: rows of x in FP8, each (and each 128 inputs, where weights have scales by block) with a scale of its own.

block_product: rows and weights both in FP8, scales by blocks of 128. (Where weights have a scale for each output, that
product is torch's.)

Over 400 lines: each kernel stands before what launches it, and they share how numbers are widened.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from workers.torch_engine.quantized.weights import BLOCK, FP8, Fp8Weight, IntWeight, QuantizedWeight

NO_ACT, SILU, GELU_TANH = -1, 0, 1
DEPTH = 128  # inputs of a round
PIECE = 4 * DEPTH  # least inputs of a piece
STRIP = 128  # most rows of a tile

# Four codes of a byte each to 16-bit floats, by their bits: converting numbers one by one takes many times as long.
# Codes of 4 bits become 128 + code (in fp16: 1024 + code), so that zero + 128 is to be taken off: the last bits of
# 0x4300, which is 128 in bf16, and of 0x6400, which is 1024 in fp16, count ones.
_LOW_HIGH = """{
    .reg .b32 p, q, r, s;
    prmt.b32 p, $4, 0, 0x4140;
    prmt.b32 q, $4, 0, 0x4342;
    shr.u32 r, p, 4;
    shr.u32 s, q, 4;
    lop3.b32 $0, p, 0x000F000F, BASE, 0xEA;
    lop3.b32 $1, q, 0x000F000F, BASE, 0xEA;
    lop3.b32 $2, r, 0x000F000F, BASE, 0xEA;
    lop3.b32 $3, s, 0x000F000F, BASE, 0xEA;
}"""
_LOW_HIGH_BF16 = tl.constexpr(_LOW_HIGH.replace("BASE", "0x43004300"))
_LOW_HIGH_FP16 = tl.constexpr(_LOW_HIGH.replace("BASE", "0x64006400"))
# e4m3: sign, exponent and mantissa move to their places, which leaves the number divided by 2^120 (in fp16: 2^8).
_E4M3 = """{
    .reg .b32 p, q, r, s, up, nil;
    mov.b32 up, UP;
    mov.b32 nil, 0x80008000;
    prmt.b32 p, $2, 0, 0x1404;
    prmt.b32 q, $2, 0, 0x3424;
    shr.u32 r, p, BY;
    shr.u32 s, q, BY;
    and.b32 r, r, MASK;
    and.b32 s, s, MASK;
    lop3.b32 p, p, 0x80008000, r, 0xEA;
    lop3.b32 q, q, 0x80008000, s, 0xEA;
    fma.rn.KIND $0, p, up, nil;
    fma.rn.KIND $1, q, up, nil;
}"""


def _filled(text: str, **given: str) -> str:
    for name, value in given.items():
        text = text.replace(name, value)
    return text


_E4M3_BF16 = tl.constexpr(_filled(_E4M3, UP="0x7B807B80", BY="4", MASK="0x07F007F0", KIND="bf16x2"))
_E4M3_FP16 = tl.constexpr(_filled(_E4M3, UP="0x5C005C00", BY="1", MASK="0x3F803F80", KIND="f16x2"))
# int8: (128 + its 7 low bits) - (128 or, with the sign's bit, 256)
_INT8 = tl.constexpr("""{
    .reg .b32 p, q, r, s, less;
    mov.b32 less, 0xBF80BF80;
    prmt.b32 p, $2, 0, 0x4140;
    prmt.b32 q, $2, 0, 0x4342;
    lop3.b32 r, p, 0x00800080, 0x43004300, 0xEA;
    lop3.b32 s, q, 0x00800080, 0x43004300, 0xEA;
    lop3.b32 p, p, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 q, q, 0x007F007F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, r, less, p;
    fma.rn.bf16x2 $1, s, less, q;
}""")


@triton.jit
def _halves(pairs, zero, KIND: tl.constexpr):
    """Both codes of each byte less their zeros, as KIND."""
    if tl.bfloat16 == KIND:
        low, high = tl.inline_asm_elementwise(
            _LOW_HIGH_BF16, "=r,=r,=r,=r,r", [pairs], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
        zero = (zero + 128.0).to(tl.bfloat16)
    elif tl.float16 == KIND:
        low, high = tl.inline_asm_elementwise(
            _LOW_HIGH_FP16, "=r,=r,=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
        zero = (zero + 1024.0).to(tl.float16)
    else:
        low, high = (pairs & 15).to(KIND), (pairs >> 4).to(KIND)
        zero = zero.to(KIND)
    return low - zero, high - zero


@triton.jit
def _wide(codes, KIND: tl.constexpr):
    """Numbers in int8 or FP8, as KIND: bytes where FP8 is made a 16-bit float."""
    if tl.bfloat16 == KIND and codes.dtype == tl.int8:
        wide = tl.inline_asm_elementwise(_INT8, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif tl.bfloat16 == KIND and codes.dtype == tl.uint8:
        wide = tl.inline_asm_elementwise(_E4M3_BF16, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif codes.dtype == tl.uint8:
        wide = tl.inline_asm_elementwise(_E4M3_FP16, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4)
    else:
        wide = codes.to(KIND)
    return wide


@triton.jit
def _widened_product(
    x_at, real, column, codes, scale, zeros, start, end, outputs, inputs, acc,
    PAIRS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, ZEROS: tl.constexpr,
    EVEN: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """acc [columns, rows] and what DEPTH inputs from ``start`` add to it, scaled where GROUP is not 0."""
    held = tl.minimum(column, outputs - 1).to(tl.int64)
    if GROUP > 0:
        s_at = (held // SHARED) * ((inputs + GROUP - 1) // GROUP) + start // GROUP
    if PAIRS:
        HALF: tl.constexpr = DEPTH // 2
        k = tl.arange(0, HALF)
        pairs = tl.load(codes + held[:, None] * (inputs // 2) + (start // 2 + k)[None, :])
        a = tl.load(x_at + (start + k)[:, None], mask=real[None, :], other=0.0)
        b = tl.load(x_at + (start + HALF + k)[:, None], mask=real[None, :], other=0.0)
        zero = tl.full([1, 1], 8.0, tl.float32)
        if ZEROS:
            zero = tl.load(zeros + s_at).to(tl.float32)[:, None]
        low, high = _halves(pairs, zero, KIND)
        part = tl.dot(low, a, input_precision="ieee")
        part = tl.dot(high, b, part, input_precision="ieee")
    else:
        k = tl.arange(0, DEPTH)
        w_at = codes + held[:, None] * inputs + (start + k)[None, :]
        if EVEN:
            w = tl.load(w_at)
            v = tl.load(x_at + (start + k)[:, None], mask=real[None, :], other=0.0)
        else:
            inside = start + k < end
            w = tl.load(w_at, mask=inside[None, :], other=0.0)
            v = tl.load(x_at + (start + k)[:, None], mask=inside[:, None] & real[None, :], other=0.0)
        if GROUP == 0:
            part = tl.dot(_wide(w, KIND), v, acc, input_precision="ieee")
        else:
            part = tl.dot(_wide(w, KIND), v, input_precision="ieee")
    if GROUP > 0:
        part = acc + part * tl.load(scale + s_at).to(tl.float32)[:, None]
    return part


@triton.jit
def widened_rows(
    x, codes, scale, zeros, bias, out, partial, done,
    rows, outputs, inputs, piece, x_row, out_row,
    PAIRS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, ZEROS: tl.constexpr,
    EVEN: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, CUT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (out's columns / COLUMNS, pieces of ``piece`` inputs, rows / ROWS). ``out`` [rows, outputs] or, with an ACT,
    [rows, outputs / 2]. GROUP 0: a scale for each output; else SHARED outputs and GROUP inputs share one."""
    tile, nth, strip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kind = x.dtype.element_ty
    row = strip * ROWS + tl.arange(0, ROWS)
    real = row < rows
    x_at = x + row.to(tl.int64)[None, :] * x_row
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    width = outputs
    if ACT >= 0:
        width = outputs // 2
    there = column < width
    begin = nth * piece
    end = tl.minimum(begin + piece, inputs)
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    up = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(begin, end, DEPTH):
        acc = _widened_product(
            x_at, real, column, codes, scale, zeros, start, end, width, inputs, acc,
            PAIRS, DEPTH, GROUP, SHARED, ZEROS, EVEN, kind,
        )  # fmt: skip
        if ACT >= 0:
            up = _widened_product(
                x_at, real, column + width, codes, scale, zeros, start, end, outputs, inputs, up,
                PAIRS, DEPTH, GROUP, SHARED, ZEROS, EVEN, kind,
            )  # fmt: skip
    if CUT:
        at = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        pieces = tl.num_programs(1)
        first = (strip * tl.num_programs(0) + tile).to(tl.int64) * pieces
        tl.store(partial + (first + nth) * (COLUMNS * ROWS) + at, acc, mask=real[None, :])
        counter = done + strip * tl.num_programs(0) + tile
        tl.debug_barrier()  # what every thread has stored is before the count, and is read only behind it
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if before < pieces - 1:
            return
        tl.debug_barrier()
        tl.store(counter, 0)
        acc = tl.zeros([COLUMNS, ROWS], tl.float32)
        for each in range(pieces):
            sums_at = partial + (first + each) * (COLUMNS * ROWS) + at
            acc += tl.load(sums_at, mask=real[None, :], other=0.0, cache_modifier=".cg")
    if GROUP == 0:
        acc *= tl.load(scale + column, mask=there, other=0.0).to(tl.float32)[:, None]
        if ACT >= 0:
            up *= tl.load(scale + column + width, mask=there, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        acc += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[:, None]
        if ACT >= 0:
            up += tl.load(bias + column + width, mask=there, other=0.0).to(tl.float32)[:, None]
    if ACT >= 0:
        gate = acc.to(kind).to(tl.float32)  # as a product of its own would leave them
        y = gate
        if ACT == 1:  # 0.5 * (1 + tanh(y)) is the logistic function of 2y
            y = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        acc = gate / (1.0 + tl.exp(tl.minimum(-y, 80.0))) * up.to(kind).to(tl.float32)
    o_at = out + row.to(tl.int64)[None, :] * out_row + column[:, None]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=there[:, None] & real[None, :])


@triton.jit
def round_rows(x, out, scale, given, size, x_row, GIVEN: tl.constexpr, SPAN: tl.constexpr):
    """Grid (rows, size / SPAN): SPAN numbers of a row of x divided by their scale, and that scale, float32
    [rows, size / SPAN]. GIVEN: it is read from ``given``."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * SPAN + tl.arange(0, SPAN)
    value = tl.load(x + row * x_row + at, mask=at < size, other=0.0).to(tl.float32)
    if GIVEN:
        unit = tl.load(given)
    else:
        unit = tl.maximum(tl.max(tl.abs(value), 0) / 448.0, 1e-12)
        unit += tl.sum(tl.where(value == value, 0.0, value), 0)  # what is no number makes all of the row so
    value = value / unit
    value = tl.where(value > 448.0, 448.0, tl.where(value < -448.0, -448.0, value))  # what is no number stays so
    tl.store(out + row * size + at, value.to(out.dtype.element_ty), mask=at < size)
    tl.store(scale + row * tl.num_programs(1) + part, unit)


@triton.jit
def block_product(
    x, x_scale, codes, scale, bias, out, rows, outputs, inputs, out_row,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (rows / ROWS * outputs / COLUMNS). ``x`` and ``codes`` in FP8, [rows, inputs] and [outputs, inputs], with
    scales [rows, inputs / DEPTH] and [outputs / DEPTH, inputs / DEPTH]; COLUMNS divides DEPTH."""
    strips = tl.cdiv(rows, ROWS)
    row = (tl.program_id(0) % strips) * ROWS + tl.arange(0, ROWS)
    first = (tl.program_id(0) // strips) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    real, there = row < rows, column < outputs
    groups = tl.cdiv(inputs, DEPTH)
    k = tl.arange(0, DEPTH)
    x_at = x + row.to(tl.int64)[:, None] * inputs + k[None, :]
    w_at = codes + column.to(tl.int64)[None, :] * inputs + k[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for nth in range(groups):
        inside = nth * DEPTH + k < inputs
        a = tl.load(x_at + nth * DEPTH, mask=real[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_at + nth * DEPTH, mask=inside[:, None] & there[None, :], other=0.0)
        of_rows = tl.load(x_scale + row.to(tl.int64) * groups + nth, mask=real, other=0.0)
        of_columns = tl.load(scale + (first // DEPTH).to(tl.int64) * groups + nth)
        acc += tl.dot(a, w) * (of_rows * of_columns)[:, None]
    if BIAS:
        acc += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    o_at = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=real[:, None] & there[None, :])


# ------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Tile:
    """What a program of widened_rows computes at a time: so many columns, or half as many of gate and of up."""

    columns: int
    warps: int
    stages: int


FEW = (Tile(64, 2, 4), Tile(32, 2, 4))  # for up to FEW_ROWS rows; which one is quicker is measured
FEW_ROWS = 32
MANY = Tile(64, 4, 3)


def widened(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, act: int = NO_ACT, tile: Tile | None = None
) -> torch.Tensor:
    """[rows, outputs] of x [rows, inputs] or, with an act, act(gate) * up [rows, outputs / 2] of gate's outputs and
    those of up behind them."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if isinstance(weight, IntWeight) and weight.order is not None:
        x = x[:, weight.order]
    rows, outputs, inputs = len(x), weight.outputs, weight.inputs
    width = outputs if act == NO_ACT else outputs // 2
    height = max(16, min(STRIP, triton.next_power_of_2(rows)))
    tile = tile or (FEW[0] if height <= FEW_ROWS else MANY)
    columns = tile.columns if act == NO_ACT else tile.columns // 2
    tiles, strips = triton.cdiv(width, columns), triton.cdiv(rows, height)
    form = _form(weight)
    room = min(COUNTERS, SUMS // (columns * height))
    pieces = 1 if act != NO_ACT else _pieces(tiles * strips, inputs, x.device, room)
    piece = triton.cdiv(triton.cdiv(inputs, pieces), form["DEPTH"]) * form["DEPTH"]
    pieces = triton.cdiv(inputs, piece)
    partial, done = _partial(x.device) if pieces > 1 else (x, x)  # pointers are asked for; they are not used
    codes, scale, zeros = _tensors(weight)
    if codes.dtype == FP8 and x.dtype != torch.float32:
        codes = codes.view(torch.uint8)
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    widened_rows[(tiles, pieces, strips)](
        x, codes, scale, zeros, x if bias is None else bias, out, partial, done,
        rows, outputs, inputs, piece, x.stride(0), out.stride(0),
        EVEN=inputs % form["DEPTH"] == 0, BIAS=bias is not None, ACT=act, CUT=pieces > 1, ROWS=height,
        COLUMNS=columns, num_warps=tile.warps, num_stages=tile.stages, **form,
    )  # fmt: skip
    return out


def _form(weight: QuantizedWeight) -> dict[str, Any]:
    """What tells the kernel how a weight lies."""
    if isinstance(weight, Fp8Weight):
        group, shared = (BLOCK, BLOCK) if weight.blocks else (0, 1)
        return {"PAIRS": False, "DEPTH": DEPTH, "GROUP": group, "SHARED": shared, "ZEROS": False}
    assert isinstance(weight, IntWeight)
    if weight.bits == 8:
        return {"PAIRS": False, "DEPTH": DEPTH, "GROUP": 0, "SHARED": 1, "ZEROS": False}
    size = weight.group
    return {"PAIRS": True, "DEPTH": size, "GROUP": size, "SHARED": 1, "ZEROS": weight.zeros is not None}


def _tensors(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros."""
    if isinstance(weight, Fp8Weight):
        return weight.values, weight.scale, weight.scale
    assert isinstance(weight, IntWeight)
    return weight.codes, weight.scale, weight.scale if weight.zeros is None else weight.zeros


def _pieces(programs: int, inputs: int, device: torch.device, room: int) -> int:
    """Into how many pieces the inputs are cut so that there are programs enough, as even as their number allows.
    ``room``: for the sums of so many programs."""
    rounds = max(1, inputs // DEPTH)
    most = max(1, min(8, inputs // PIECE, PROGRAMS * _multiprocessors(device) // programs, room // programs))
    return max((n for n in range(1, most + 1) if rounds % n == 0), default=1)


PROGRAMS = 4  # for each multiprocessor
COUNTERS = 1024
SUMS = COUNTERS * 64 * FEW_ROWS


@cache
def _partial(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of pieces, and how many of a tile are done. One for all products: a stream runs in order. Made before
    anything is recorded, and kept."""
    return torch.zeros(SUMS, device=device), torch.zeros(COUNTERS, dtype=torch.int32, device=device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def rounded(x: torch.Tensor, weight: Fp8Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, inputs] in FP8 and its scales, float32 [rows, 1] or, for a weight in blocks, [rows, inputs / BLOCK]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, size = x.shape
    span = BLOCK if weight.blocks else triton.next_power_of_2(size)
    out = torch.empty(rows, size, dtype=FP8, device=x.device)
    scale = torch.empty(rows, triton.cdiv(size, span), device=x.device)
    given = weight.input_scale
    round_rows[(rows, scale.shape[1])](
        x, out, scale, scale if given is None else given, size, x.stride(0), GIVEN=given is not None, SPAN=span,
        num_warps=1 if weight.blocks else 8,
    )  # fmt: skip
    return out, scale


def product_in_fp8(x: torch.Tensor, weight: Fp8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """[rows, outputs] of x [rows, inputs], both sides in FP8."""
    small, of_rows = rounded(x, weight)
    rows, outputs = len(x), weight.outputs
    if not weight.blocks:
        on_gpu = x.device.type == "cuda"
        found: torch.Tensor = torch._scaled_mm(
            small, weight.values.t(), scale_a=of_rows, scale_b=weight.scale.t(),
            out_dtype=torch.bfloat16 if on_gpu else x.dtype,  # on a GPU there is no other with scales of rows
            use_fast_accum=on_gpu,
        )  # fmt: skip
        return found.to(x.dtype) if bias is None else found.to(x.dtype) + bias.to(x.dtype)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, STRIP) * triton.cdiv(outputs, BLOCK),)
    block_product[grid](
        small, of_rows, weight.values, weight.scale, x if bias is None else bias, out,
        rows, outputs, weight.inputs, out.stride(0),
        BIAS=bias is not None, ROWS=STRIP, COLUMNS=BLOCK, DEPTH=BLOCK, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
