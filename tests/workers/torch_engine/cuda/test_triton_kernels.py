"""The fused operations against torch, with strided rows and sizes that are no powers of two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.workers.torch_engine.cuda.triton_device import DEVICE
from workers.torch_engine.cuda import triton_kernels as kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def close(ours, theirs):
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[ours.dtype]
    torch.testing.assert_close(ours.float(), theirs.float(), atol=tolerance, rtol=tolerance)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def norm(x, weight, eps):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)) * weight.float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 96, 576])
def test_norm_with_and_without_an_addition(dtype, size):
    x, delta, weight = draw(1, 5, size, dtype=dtype), draw(1, 5, size, dtype=dtype, seed=1), draw(size, dtype=dtype)
    close(kernels.rms_norm(x, weight, 1e-5), norm(x, weight, 1e-5))
    total, out = kernels.add_rms_norm(x, delta, weight, 1e-5)
    if dtype != torch.bfloat16 or DEVICE.type != "cpu":  # the interpreter cuts bfloat16 off instead of rounding
        assert torch.equal(total, x + delta)
    close(total, x + delta)
    close(out, norm(x + delta, weight, 1e-5))


def test_norm_of_strided_rows():
    wide = draw(5, 200)
    x = wide[:, 20:116]
    close(kernels.rms_norm(x, draw(96, seed=1), 1e-6), norm(x, draw(96, seed=1), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [96, 1536])
def test_gates(dtype, size):
    both = draw(4, 2 * size, dtype=dtype) * 3
    gate, up = both[:, :size], both[:, size:]
    close(kernels.gated(gate, up, kernels.SILU), F.silu(gate.float()) * up.float())
    close(kernels.gated(gate, up, kernels.GELU_TANH), F.gelu(gate.float(), approximate="tanh") * up.float())


def rotate(x, cos, sin):
    low, high = x.float().chunk(2, -1)
    return x.float() * cos[:, None].float() + torch.cat([-high, low], -1) * sin[:, None].float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (7, 1, 24), (3, 3, 80)])
def test_rotary_and_store_in_one(dtype, heads, kv_heads, size):
    tokens = 5
    merged = draw(tokens, (heads + 2 * kv_heads) * size, dtype=dtype).view(tokens, -1, size)
    query, key, value = merged.split([heads, kv_heads, kv_heads], 1)
    angles = draw(tokens, size, seed=3)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (torch.zeros(32, kv_heads, size, dtype=dtype, device=DEVICE) for _ in range(2))
    slots = torch.tensor([9, 3, -1, 30, -1], device=DEVICE)
    rotated = kernels.rotate_and_store_kv(key, value, keys, values, slots, query, cos, sin)
    close(rotated, rotate(query, cos, sin))
    real = slots >= 0
    close(keys[slots[real]], rotate(key, cos, sin)[real])
    assert torch.equal(values[slots[real]], value[real])
    assert (keys.abs().sum((1, 2)) > 0).sum() == (values.abs().sum((1, 2)) > 0).sum() == 3  # nothing from padding


def test_store_alone_with_unequal_sizes():
    key, value = draw(3, 2, 24), draw(3, 2, 16, seed=1)
    keys, values = torch.zeros(8, 2, 24, device=DEVICE), torch.zeros(8, 2, 16, device=DEVICE)
    kernels.store_kv(key, value, keys, values, torch.tensor([7, -1, 2], device=DEVICE))
    assert torch.equal(keys[[7, 2]], key[[0, 2]])
    assert torch.equal(values[[7, 2]], value[[0, 2]])
    assert not keys[[0, 1, 3, 4, 5, 6]].any()


def test_what_fp8_cannot_hold_is_stored_as_its_largest_and_what_is_no_number_stays_none():
    key = torch.tensor([0.3, -0.3, 447.0, 600.0, -1e6, float("inf"), float("-inf"), float("nan")], device=DEVICE)
    key = key.view(1, 1, 8)
    pools = [torch.zeros(2, 1, 8, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2)]
    kernels.store_kv(key, key, *pools, torch.tensor([1], device=DEVICE))
    for pool in pools:
        assert pool[1].float().flatten()[:7].tolist() == [0.3125, -0.3125, 448.0, 448.0, -448.0, 448.0, -448.0]
        assert pool[1].float().flatten()[7].isnan()
        assert not pool[0].float().any()
