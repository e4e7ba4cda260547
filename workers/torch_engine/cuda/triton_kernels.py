"""Small fused operations on a GPU: each saves a trip of the activations through device memory, and launches.

They compute in float32 and round once at the end, where torch rounds after each operation; put in place by
triton_fuse.py, which compares each with what it replaces.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-any-return"
from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDEST_NORM = 16384  # values of a row that one program holds
SILU, GELU_TANH = 0, 1


@triton.jit
def fitted(value, kind: tl.constexpr):
    """``value`` as ``kind``. What FP8 cannot hold becomes the largest that it can; what is no number stays none."""
    if kind == tl.float8e4nv:
        value = tl.clamp(value.to(tl.float32), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return value.to(kind)


@triton.jit
def norm_rows(
    x, delta, total, weight, out, x_row, delta_row, eps,
    SIZE: tl.constexpr, SIZE_P2: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Grid (rows). out = weight * s / rms(s), s = x, or where ADD: x + delta, which is stored to ``total`` too."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIZE_P2)
    inside = at < SIZE
    value = tl.load(x + row * x_row + at, mask=inside, other=0.0)
    if ADD:
        more = tl.load(delta + row * delta_row + at, mask=inside, other=0.0)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * SIZE + at, value, mask=inside)
    wide = value.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + at, (scaled * gain).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gate_rows(gate, up, out, gate_row, up_row, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACT: tl.constexpr):
    """Grid (rows, columns / BLOCK). out = act(gate) * up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    g = tl.load(gate + row * gate_row + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, mask=inside, other=0.0).to(tl.float32)
    if ACT == 0:
        y = g
    else:  # 0.5 * (1 + tanh(y)) is the logistic function of 2y
        y = 1.5957691216057308 * (g + 0.044715 * g * g * g)
    g = g / (1.0 + tl.exp(tl.minimum(-y, 80.0)))  # no overflow
    tl.store(out + row * SIZE + at, (g * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _copy_heads(
    source, head_stride, target, target_stride,
    HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_P2: tl.constexpr, HEADS_P2: tl.constexpr,
):  # fmt: skip
    head, at = tl.arange(0, HEADS_P2), tl.arange(0, SIZE_P2)
    mask = (head < HEADS)[:, None] & (at < SIZE)[None, :]
    held = tl.load(source + head[:, None] * head_stride + at[None, :], mask=mask, other=0.0)
    tl.store(target + head[:, None] * target_stride + at[None, :], fitted(held, target.dtype.element_ty), mask=mask)


@triton.jit
def _turn_heads(
    source, head_stride, target, target_stride, cos, sin,
    HEADS: tl.constexpr, HALF: tl.constexpr, HALF_P2: tl.constexpr, HEADS_P2: tl.constexpr,
):  # fmt: skip
    """Rotate pairs (d, d + HALF) by the token's angles. The tables may differ in their halves."""
    head, at = tl.arange(0, HEADS_P2), tl.arange(0, HALF_P2)
    inside = at < HALF
    mask = (head < HEADS)[:, None] & inside[None, :]
    source += head[:, None] * head_stride + at[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    cos_low = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + HALF + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + HALF + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    kind = target.dtype.element_ty
    target += head[:, None] * target_stride + at[None, :]
    tl.store(target, fitted(low * cos_low - high * sin_low, kind), mask=mask)
    tl.store(target + HALF, fitted(high * cos_high + low * sin_high, kind), mask=mask)


@triton.jit
def rotate_and_store(
    query, key, value, rotated, keys, values, slots, cos, sin,
    q_token, q_head, k_token, k_head, v_token, v_head, angle_row, pool_k_slot, pool_k_head, pool_v_slot, pool_v_head,
    HEADS: tl.constexpr, HEADS_P2: tl.constexpr, KV_HEADS: tl.constexpr, KV_HEADS_P2: tl.constexpr,
    DK: tl.constexpr, DK_P2: tl.constexpr, DV: tl.constexpr, DV_P2: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, 2 or 3): values to the pool; keys to the pool, rotated where ROTATE; then queries, rotated.

    Keys and values of slot -1 are padding and go nowhere.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + token)
    if part == 2:
        source, target = query + token * q_token, rotated + token * HEADS * DK
        angles = token * angle_row
        _turn_heads(source, q_head, target, DK, cos + angles, sin + angles, HEADS, DK // 2, DK_P2 // 2, HEADS_P2)
    elif slot >= 0:
        if part == 0:
            held, place = value + token * v_token, values + slot * pool_v_slot
            _copy_heads(held, v_head, place, pool_v_head, KV_HEADS, DV, DV_P2, KV_HEADS_P2)
        else:
            fresh, home = key + token * k_token, keys + slot * pool_k_slot
            if ROTATE:
                angle = token * angle_row
                _turn_heads(
                    fresh, k_head, home, pool_k_head, cos + angle, sin + angle,
                    KV_HEADS, DK // 2, DK_P2 // 2, KV_HEADS_P2,
                )  # fmt: skip
            else:
                _copy_heads(fresh, k_head, home, pool_k_head, KV_HEADS, DK, DK_P2, KV_HEADS_P2)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / rms(x) over the last dimension, in x's precision."""
    rows = _rows(x)
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    _norm(rows, rows, out, weight, out, eps, add=False)
    return out.view(x.shape)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, its norm): the sum is rounded to x's precision first, as a model that adds and then norms does."""
    rows, more = _rows(x), _rows(delta)
    total, out = (torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(2))
    _norm(rows, more, total, weight, out, eps, add=True)
    return total.view(x.shape), out.view(x.shape)


def _norm(
    x: torch.Tensor, delta: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float,
    add: bool,
) -> None:  # fmt: skip
    size = x.shape[1]
    warps = 4 if size <= 2048 else 8 if size <= 8192 else 16
    norm_rows[(x.shape[0],)](
        x, delta, total, weight, out, x.stride(0), delta.stride(0), eps,
        SIZE=size, SIZE_P2=triton.next_power_of_2(size), ADD=add, num_warps=warps,
    )  # fmt: skip


def gated(gate: torch.Tensor, up: torch.Tensor, act: int) -> torch.Tensor:
    """act(gate) * up; both [rows, size], rows may be strided."""
    rows, size = gate.shape
    out = torch.empty(rows, size, dtype=gate.dtype, device=gate.device)
    block = min(1024, triton.next_power_of_2(size))
    gate_rows[(rows, triton.cdiv(size, block))](
        gate, up, out, gate.stride(0), up.stride(0), SIZE=size, BLOCK=block, ACT=act, num_warps=4
    )
    return out


def store_kv(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write key and value, each [T, kv_heads, size], to one layer's pool tensors at ``slots`` [T]."""
    _store(key, value, keys, values, slots, key, key, slots, slots, rotate=False)


def rotate_and_store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    query: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """The same, keys rotated on their way by the tables ``cos`` and ``sin`` [T, key_size]; gives ``query``
    [T, heads, key_size] rotated."""
    rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _store(key, value, keys, values, slots, query, rotated, cos, sin, rotate=True)
    return rotated


def _store(
    key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor,
    query: torch.Tensor, rotated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate: bool,
) -> None:  # fmt: skip
    heads, kv_heads, key_size, value_size = query.shape[1], key.shape[1], key.shape[2], value.shape[2]
    rotate_and_store[(key.shape[0], 3 if rotate else 2)](
        query, key, value, rotated, keys, values, slots, cos, sin,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1), cos.stride(0),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        HEADS=heads, HEADS_P2=triton.next_power_of_2(heads),
        KV_HEADS=kv_heads, KV_HEADS_P2=triton.next_power_of_2(kv_heads),
        DK=key_size, DK_P2=triton.next_power_of_2(key_size), DV=value_size, DV_P2=triton.next_power_of_2(value_size),
        ROTATE=rotate, num_warps=4,
    )  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, size] with adjacent elements; rows may be strided."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
