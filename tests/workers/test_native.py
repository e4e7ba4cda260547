"""Every native kernel against torch, on each instruction set that this processor has."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from workers import native
from workers.native import Kernels, KernelsUnavailable, Packed, instruction_sets, load_kernels

try:
    load_kernels()
except KernelsUnavailable as error:
    pytest.skip(f"native kernels: {error}", allow_module_level=True)


@pytest.fixture(params=instruction_sets())
def kernels(request: pytest.FixtureRequest) -> Kernels:
    built = next(Path(native.__file__).parent.glob("_kernels*.so"))
    return Kernels(ctypes.CDLL(str(built)), request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_one_openmp_runtime_is_mapped() -> None:
    load_kernels()
    torch.randn(512, 512) @ torch.randn(512, 512)
    assert len(native._mapped_openmp()) == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 13, 25, 200])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 8), (48, 64), (37, 96), (5, 300), (130, 513)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear(kernels: Kernels, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs)
    x = torch.randn(rows, inputs + 3)[:, :inputs]  # strided rows
    out = kernels.linear(x, Packed(weight, bias), torch.empty(rows, outputs))
    torch.testing.assert_close(out, F.linear(x, weight.float(), bias), rtol=1e-4, atol=1e-4)


def test_int8_is_the_rounded_weight(kernels: Kernels) -> None:
    weight, x = torch.randn(37, 96), torch.randn(29, 96)
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    expected = F.linear(x, (weight / scale).round() * scale)
    for rows in (1, 29):
        out = kernels.linear(x[:rows], Packed(weight, None, int8=True), torch.empty(rows, 37))
        torch.testing.assert_close(out, expected[:rows], rtol=1e-4, atol=1e-4)


def _reference_attention(q, k, v, base, scale, softcap, window, sinks):  # type: ignore[no-untyped-def]
    """One sequence: q [n, H, dk] at positions base.., keys and values [c, KVH, d]."""
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,chd->hnc", q, k.repeat_interleave(group, 1)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions = base + torch.arange(len(q))[:, None]
    keys = torch.arange(len(k))[None]
    hidden = keys > positions
    if window:
        hidden |= keys <= positions - window
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(k)]
    return torch.einsum("hnc,chd->nhd", weights, v.repeat_interleave(group, 1))


@pytest.mark.parametrize("block_size", [4, 16, 80])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dk", "dv"), [(4, 2, 32, 32), (6, 1, 64, 64), (3, 3, 20, 12), (8, 8, 128, 80)]
)
@pytest.mark.parametrize(
    ("softcap", "window", "sinks"), [(0.0, 0, False), (5.0, 0, False), (0.0, 7, False), (0.0, 20, True)]
)
def test_attention(kernels, block_size, heads, kv_heads, dk, dv, softcap, window, sinks) -> None:  # type: ignore[no-untyped-def]
    lengths, queries = [1, 37, 90, 64], [1, 5, 1, 23]  # context after the step; the last of them computed in it
    blocks = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(blocks))
    k = torch.full((sum(blocks), block_size, kv_heads, dk), math.nan)  # what must not be read is poison
    v = torch.full((sum(blocks), block_size, kv_heads, dv), math.nan)
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    q = torch.randn(sum(queries), heads, dk)
    sink = torch.randn(heads) if sinks else None
    expected, given = [], 0
    starts = torch.tensor([0, *torch.tensor(queries).cumsum(0)], dtype=torch.int32)
    for s, (length, count) in enumerate(zip(lengths, queries, strict=True)):
        table = order[given : given + blocks[s]]
        given += blocks[s]
        tables[s, : blocks[s]] = table
        keys, values = torch.randn(length, kv_heads, dk), torch.randn(length, kv_heads, dv)
        slots = table[torch.arange(length) // block_size] * block_size + torch.arange(length) % block_size
        padding = torch.tensor([-1])
        kernels.store(torch.cat([keys, keys[:1]]), k, torch.cat([slots, padding]))
        kernels.store(torch.cat([values, values[:1]]), v, torch.cat([slots, padding]))
        mine = q[int(starts[s]) : int(starts[s + 1])]
        expected.append(_reference_attention(mine, keys, values, length - count, 0.3, softcap, window, sink))
    out = torch.empty(sum(queries), heads, dv)
    contexts = torch.tensor(lengths, dtype=torch.int32)
    kernels.attention(
        q, k, v, out, tables, starts, contexts, scale=0.3, softcap=softcap, window=window, sinks=sink
    )  # fmt: skip
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("width", [7, 64, 577])
def test_rms_norm(kernels: Kernels, width: int) -> None:
    x, weight = torch.randn(9, width + 2)[:, :width], torch.randn(width)
    out = kernels.rms_norm(x, weight, 1e-5, torch.empty(9, width))
    torch.testing.assert_close(out, F.rms_norm(x, (width,), weight, 1e-5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [5, 64, 131])
def test_gated(kernels: Kernels, width: int) -> None:
    both = torch.randn(9, 2 * width) * 4
    gate, up = both[:, :width], both[:, width:]
    for kind, act in enumerate([F.silu, lambda g: F.gelu(g, approximate="tanh")]):
        out = kernels.gated(gate, up, torch.empty(9, width), kind)
        torch.testing.assert_close(out, act(gate) * up, rtol=1e-5, atol=1e-5)
    extreme = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    torch.testing.assert_close(kernels.gated(extreme, extreme, torch.empty(1, 5), 0), F.silu(extreme) * extreme)


@pytest.mark.parametrize("rot", [4, 24, 64])
def test_rotary(kernels: Kernels, rot: int) -> None:
    x = torch.randn(1, 3, 11, rot).transpose(1, 2)[0]  # [T, H, rot], as models hand it over
    angles = torch.randn(11, rot // 2).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    half = torch.cat([-x[..., rot // 2 :], x[..., : rot // 2]], dim=-1)
    expected = x * cosine[:, None] + half * sine[:, None]
    out = kernels.rotary(x, cosine, sine, torch.empty(11, 3, rot))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
