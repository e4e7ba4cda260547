"""Every native kernel against torch, on each instruction set that this processor has."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from workers.native import library as native
from workers.native.library import (
    Kernels,
    KernelsUnavailable,
    Packed,
    Pool,
    Rule,
    instruction_sets,
    load_kernels,
    make_step,
)

try:
    load_kernels()
except KernelsUnavailable as error:
    pytest.skip(f"native kernels: {error}", allow_module_level=True)


@pytest.fixture(params=instruction_sets())
def kernels(request: pytest.FixtureRequest) -> Kernels:
    built = next(Path(native.__file__).parent.glob("_kernels*.so"))
    chosen = Kernels(ctypes.CDLL(str(built)), request.param)
    chosen.set_threads(3)
    return chosen


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_the_team_changes_its_size_and_serves_several_callers(kernels: Kernels) -> None:
    """One call at a time has the team; those that come meanwhile compute alone, and all are right."""
    weight, x = torch.randn(512, 96), torch.randn(7, 96)
    packed, expected = Packed(weight, None), F.linear(x, weight)
    for threads in (1, 4, 2, 5):
        kernels.set_threads(threads)
        wrong: list[int] = []

        def call(wrong: list[int] = wrong) -> None:
            for _ in range(50):
                out = kernels.linear(x, packed, torch.empty(7, 512))
                wrong.append(int(not torch.allclose(out, expected, rtol=1e-4, atol=1e-4)))

        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert len(wrong) == 150
        assert not any(wrong)


def test_a_forked_process_has_a_team_of_its_own(kernels: Kernels) -> None:
    packed = Packed(torch.randn(512, 96), None)
    x, ours = torch.randn(7, 96), torch.empty(7, 512)
    kernels.linear(x, packed, ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: what is tested here
        child = os.fork()
    if child == 0:
        again = kernels.linear(x, packed, torch.empty(7, 512))
        os._exit(0 if bool((again == ours).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_touching_takes_memory_and_changes_nothing(kernels: Kernels) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 64 << 20
    tensor = torch.from_numpy(np.zeros(size // 4, np.float32))
    tensor[5000:9000] = torch.arange(4000)
    before = resident()
    kernels.touch(tensor)
    assert resident() - before > size // 2
    assert tensor.sum() == tensor[5000:9000].sum() == 3999 * 2000


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


@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(16, 32, 32), (37, 128, 64), (5, 512, 128), (130, 768, 256), (48, 48, 16)]
)
def test_int4_is_code_times_scale_plus_shift(kernels: Kernels, outputs: int, inputs: int, group: int) -> None:
    draw = torch.Generator().manual_seed(inputs)
    codes = torch.randint(0, 16, (outputs, inputs // group, 2, group // 2), generator=draw, dtype=torch.uint8)
    scale, shift = (torch.randn(outputs, inputs // group, generator=draw) for _ in range(2))
    bias, x = torch.randn(outputs, generator=draw), torch.randn(200, inputs + 3, generator=draw)[:, :inputs]
    pairs = (codes[:, :, 0] | codes[:, :, 1] << 4).flatten(1)
    wide = (codes.flatten(2).double() * scale.double()[..., None] + shift.double()[..., None]).flatten(1)
    packed = Packed.of_int4(pairs, scale, shift, group, bias)
    torch.testing.assert_close(packed.unpacked().double(), wide, rtol=1e-5, atol=1e-5)
    expected = (x.double() @ wide.T + bias).float()
    whole = kernels.linear(x, packed, torch.empty(200, outputs))
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-3)
    for rows in (1, 2, 7, 13):
        some = kernels.linear(x[:rows], packed, torch.empty(rows, outputs))
        assert torch.equal(some, whole[:rows]), "a row's sums do not depend on the rows beside it"


def test_int4_weights_are_joined_where_their_groups_are_the_same(kernels: Kernels) -> None:
    draw = torch.Generator().manual_seed(1)
    parts = []
    for outputs, group in ((32, 32), (16, 32), (16, 64)):
        codes = torch.randint(0, 256, (outputs, 64), generator=draw, dtype=torch.uint8)
        scale, shift = (torch.randn(outputs, 128 // group, generator=draw) for _ in range(2))
        parts.append(Packed.of_int4(codes, scale, shift, group, None))
    assert Packed.concat(parts) is None
    joined, x = Packed.concat(parts[:2]), torch.randn(3, 128, generator=draw)
    assert joined is not None
    each = torch.cat([kernels.linear(x, part, torch.empty(3, part.outputs)) for part in parts[:2]], 1)
    assert torch.equal(kernels.linear(x, joined, torch.empty(3, 48)), each)


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


@pytest.mark.parametrize("block_size", [4, 16, 20, 80])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dk", "dv"), [(4, 2, 32, 32), (6, 1, 64, 64), (3, 3, 20, 12), (8, 8, 128, 80)]
)
@pytest.mark.parametrize(
    ("softcap", "window", "sinks"), [(0.0, 0, False), (5.0, 0, False), (0.0, 7, False), (0.0, 20, True)]
)
def test_attention(kernels, block_size, heads, kv_heads, dk, dv, softcap, window, sinks) -> None:  # type: ignore[no-untyped-def]
    lengths, queries = [1, 37, 90, 64, 300], [1, 5, 1, 23, 130]  # context after the step; computed in it
    group = heads // kv_heads
    blocks = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(blocks))
    padded = -(-block_size // native.PANEL) * native.PANEL
    k = torch.full((sum(blocks) * padded, kv_heads, dk), math.nan)  # what must not be read is poison
    v = torch.full((sum(blocks) * padded, kv_heads, dv), math.nan)
    pool = Pool(k.data_ptr(), v.data_ptr(), kv_heads, dk, dv, block_size)
    tables = np.zeros((len(lengths), max(blocks)), np.int32)
    q = torch.randn(sum(queries), heads, dk)
    sink = torch.randn(heads) if sinks else None
    expected, given = [], 0
    starts = np.array([0, *np.cumsum(queries)], np.int32)
    for s, (length, count) in enumerate(zip(lengths, queries, strict=True)):
        table = order[given : given + blocks[s]]
        given += blocks[s]
        tables[s, : blocks[s]] = table
        keys, values = torch.randn(length, kv_heads, dk), torch.randn(length, kv_heads, dv)
        slots = table[torch.arange(length) // block_size] * block_size + torch.arange(length) % block_size
        slots = torch.cat([slots, torch.tensor([-1])])
        kernels.store(torch.cat([keys, keys[:1]]), torch.cat([values, values[:1]]), pool, slots)
        mine = q[int(starts[s]) : int(starts[s + 1])]
        expected.append(_reference_attention(mine, keys, values, length - count, 0.3, softcap, window, sink))
    step = make_step(tables, starts, np.array(lengths, np.int32), torch.zeros(len(q), dtype=torch.int64), group)
    rule = Rule(0.3, softcap, window, None if sink is None else sink.data_ptr())
    out = kernels.attention(q, pool, step, rule, torch.empty(sum(queries), heads, dv))
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_product_does_not_depend_on_its_neighbours(kernels: Kernels, dtype: torch.dtype, int8: bool) -> None:
    """Bit by bit: the same request must draw the same tokens beside whomever it runs."""
    packed = Packed(torch.randn(2 * 32, 700).to(dtype), torch.randn(2 * 32), int8=int8)
    x = torch.randn(200, 700)
    whole = kernels.linear(x, packed, torch.empty(200, 64))
    gated = kernels.gate_up(x, packed, 0, torch.empty(200, 32))
    for begin, end in ((0, 1), (5, 7), (9, 12), (20, 28), (40, 53), (60, 160)):
        part = x[begin:end]
        assert torch.equal(kernels.linear(part, packed, torch.empty(len(part), 64)), whole[begin:end])
        assert torch.equal(kernels.gate_up(part, packed, 0, torch.empty(len(part), 32)), gated[begin:end])


@pytest.mark.parametrize("window", [0, 70])
def test_a_row_of_attention_does_not_depend_on_the_chunk_it_is_in(kernels: Kernels, window: int) -> None:
    length, heads, kv_heads, size = 300, 6, 2, 32
    keys, values = torch.zeros(320, kv_heads, size), torch.zeros(320, kv_heads, size)
    pool = Pool(keys.data_ptr(), values.data_ptr(), kv_heads, size, size, 16)
    slots = torch.arange(length)
    kernels.store(torch.randn(length, kv_heads, size), torch.randn(length, kv_heads, size), pool, slots)
    q, rule = torch.randn(length, heads, size), Rule(0.2, 0.0, window, None)
    tables = np.arange(20, dtype=np.int32)[None]

    def attend(begin: int, end: int) -> torch.Tensor:
        starts, contexts = np.array([0, end - begin], np.int32), np.array([end], np.int32)
        step = make_step(tables, starts, contexts, slots[begin:end], heads // kv_heads)
        return kernels.attention(q[begin:end], pool, step, rule, torch.empty(end - begin, heads, size))

    whole = attend(0, length)
    for begin, end in ((0, 1), (63, 66), (130, 131), (200, 300), (299, 300)):
        assert torch.equal(attend(begin, end), whole[begin:end])


@pytest.mark.parametrize("width", [7, 64, 577])
def test_rms_norm(kernels: Kernels, width: int) -> None:
    x, weight = torch.randn(9, width + 2)[:, :width], torch.randn(width)
    out = kernels.rms_norm(x, weight, 1e-5, torch.empty(9, width))
    torch.testing.assert_close(out, F.rms_norm(x, (width,), weight, 1e-5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 9, 200])
@pytest.mark.parametrize(("act", "torch_act"), list(enumerate([F.silu, lambda g: F.gelu(g, approximate="tanh")])))
def test_gate_up(kernels: Kernels, rows: int, act: int, torch_act) -> None:  # type: ignore[no-untyped-def]
    weight, bias, x = torch.randn(2 * 48, 20), torch.randn(2 * 48), torch.randn(rows, 20)
    gate, up = F.linear(x, weight, bias).chunk(2, dim=-1)
    out = kernels.gate_up(x, Packed(weight, bias), act, torch.empty(rows, 48))
    torch.testing.assert_close(out, torch_act(gate) * up, rtol=1e-4, atol=1e-4)


def test_extreme_gates(kernels: Kernels) -> None:
    x = torch.tensor([[-1e4], [-100.0], [0.0], [100.0], [1e4]])
    out = kernels.gate_up(x, Packed(torch.ones(32, 1), None), 0, torch.empty(5, 16))
    torch.testing.assert_close(out, (F.silu(x) * x).expand(5, 16))


@pytest.mark.parametrize("rot", [4, 24, 64])
def test_rotary(kernels: Kernels, rot: int) -> None:
    x = torch.randn(1, 3, 11, rot).transpose(1, 2)[0]  # [T, H, rot], as models hand it over
    angles = torch.randn(11, rot // 2).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    half = torch.cat([-x[..., rot // 2 :], x[..., : rot // 2]], dim=-1)
    expected = x * cosine[:, None] + half * sine[:, None]
    out = kernels.rotary(x, cosine, sine, torch.empty(11, 3, rot))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
