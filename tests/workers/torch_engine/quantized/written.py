"""Weights written as each method's description has them, beside the float64 matrix that they stand for.

Written with loops over single numbers, from the formats' descriptions and from nothing of ours, so that an order of
bits, of scales or of zeros that is read wrongly shows.
"""

from __future__ import annotations

import numpy as np
import torch

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]

Tensors = dict[str, torch.Tensor]
Written = tuple[Tensors, np.ndarray]


def e4m3(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def fp8_codes(rng: np.random.Generator, outputs: int, inputs: int) -> tuple[torch.Tensor, np.ndarray]:
    """Any e4m3 that is a number."""
    codes = rng.integers(0, 126, (outputs, inputs)) + 128 * rng.integers(0, 2, (outputs, inputs))
    table = [e4m3(code) for code in range(256)]
    wide = np.array([[table[code] for code in row] for row in codes])
    return torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn), wide


def floats(
    rng: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, np.ndarray]:
    """Scales of very different sizes, as stored and as they are."""
    stored = torch.from_numpy(np.asarray(np.exp(rng.normal(size=shape)) / 500)).to(dtype)
    return stored, stored.double().numpy()


def fp8(rng: np.random.Generator, outputs: int, inputs: int, scale: str, name: str = "weight_scale") -> Written:
    """``scale``: tensor, row or block."""
    values, wide = fp8_codes(rng, outputs, inputs)
    shape = {"tensor": (), "row": (outputs, 1), "block": (-(-outputs // 128), -(-inputs // 128))}[scale]
    stored, units = floats(rng, *shape)
    for n in range(outputs):
        for k in range(inputs):
            wide[n, k] *= {"tensor": units, "row": units[n, 0] if scale == "row" else 0}.get(
                scale, units[n // 128, k // 128] if scale == "block" else 0
            )
    return {"weight": values, name: stored}, wide


def int8(rng: np.random.Generator, outputs: int, inputs: int) -> Written:
    codes = rng.integers(-128, 128, (outputs, inputs))
    stored, units = floats(rng, outputs, 1, dtype=torch.bfloat16)
    return {"weight": torch.from_numpy(codes.astype(np.int8)), "weight_scale": stored}, codes * units


def words(rows: list[list[int]], bits: int) -> torch.Tensor:
    """int32 [rows, n]: of each row 32 / bits numbers to a word, the first in the lowest bits."""
    each = 32 // bits
    found = [[sum(row[at + i] << (bits * i) for i in range(each)) for at in range(0, len(row), each)] for row in rows]
    return torch.from_numpy(np.array(found, dtype=np.uint32).view(np.int32))


def gptq(
    rng: np.random.Generator, outputs: int, inputs: int, group: int, *, bits: int = 4, act_order: bool = False,
    symmetric: bool = False, version: str = "gptq",
) -> Written:  # fmt: skip
    groups = inputs // group
    codes = rng.integers(0, 1 << bits, (inputs, outputs))
    zeros = rng.integers(1, 1 << bits, (groups, outputs))
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    stored, units = floats(rng, groups, outputs, dtype=torch.float16)
    index = np.arange(inputs) // group
    if act_order:
        rng.shuffle(index)
    wide = np.zeros((outputs, inputs))
    for n in range(outputs):
        for k in range(inputs):
            wide[n, k] = units[index[k], n] * (codes[k, n] - zeros[index[k], n])
    less = 0 if version == "gptq_v2" else 1
    tensors = {
        "qweight": words(codes.T.tolist(), bits).t().contiguous(),
        "qzeros": words((zeros - less).tolist(), bits),
        "scales": stored,
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    return tensors, wide


def awq(rng: np.random.Generator, outputs: int, inputs: int, group: int) -> Written:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    groups = inputs // group
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (groups, outputs))
    stored, units = floats(rng, groups, outputs, dtype=torch.float16)

    def packed(numbers: np.ndarray) -> torch.Tensor:
        rows = [[int(row[at + order[i]]) for at in range(0, outputs, 8) for i in range(8)] for row in numbers]
        return words(rows, 4)

    wide = np.zeros((outputs, inputs))
    for n in range(outputs):
        for k in range(inputs):
            wide[n, k] = units[k // group, n] * (codes[k, n] - zeros[k // group, n])
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": stored}, wide


def packed(
    rng: np.random.Generator, outputs: int, inputs: int, group: int, *, bits: int = 4, zeros: bool = False,
    act_order: bool = False,
) -> Written:  # fmt: skip
    """compressed-tensors: numbers with a sign, stored with 2^(bits - 1) added, zeros packed along the outputs."""
    half, groups = 1 << (bits - 1), inputs // group
    codes = rng.integers(-half, half, (outputs, inputs))
    none = np.zeros((outputs, groups), int)
    points = rng.integers(-half, half, (outputs, groups)) if zeros else none
    stored, units = floats(rng, outputs, groups, dtype=torch.bfloat16)
    index = np.arange(inputs) // group
    if act_order:
        rng.shuffle(index)
    wide = np.zeros((outputs, inputs))
    for n in range(outputs):
        for k in range(inputs):
            wide[n, k] = units[n, index[k]] * (codes[n, k] - points[n, index[k]])
    tensors = {
        "weight_packed": words((codes + half).tolist(), bits),
        "weight_scale": stored,
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if zeros:
        tensors["weight_zero_point"] = words((points + half).T.tolist(), bits).t().contiguous()
    if act_order:
        tensors["weight_g_idx"] = torch.from_numpy(index.astype(np.int32))
    return tensors, wide


def fp4_bytes(rng: np.random.Generator, *shape: int) -> tuple[torch.Tensor, np.ndarray]:
    codes = rng.integers(0, 16, shape)
    wide = np.vectorize(FP4.__getitem__)(codes).astype(float)
    return torch.from_numpy((codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)), wide


def nvfp4(rng: np.random.Generator, outputs: int, inputs: int, *, divided: bool) -> Written:
    """``divided``: by a scale for all, as compressed-tensors has it; modelopt multiplies."""
    codes, wide = fp4_bytes(rng, outputs, inputs)
    scale = torch.from_numpy(rng.uniform(1, 400, (outputs, inputs // 16))).to(torch.float8_e4m3fn)
    units = scale.double().numpy()
    whole = np.float32(37.0)
    for n in range(outputs):
        for k in range(inputs):
            wide[n, k] *= units[n, k // 16] / whole if divided else units[n, k // 16] * np.float32(1 / whole)
    if divided:
        return {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": torch.tensor([whole])}, wide
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": torch.tensor(np.float32(1 / whole))}, wide


def mxfp4(rng: np.random.Generator, experts: int, outputs: int, inputs: int) -> Written:
    """As gpt-oss's files have it; the matrix is turned, as its model has it: [experts, inputs, outputs]."""
    codes, wide = fp4_bytes(rng, experts, outputs, inputs)
    powers = rng.integers(118, 130, (experts, outputs, inputs // 32))
    for k in range(inputs):
        wide[..., k] *= 2.0 ** (powers[..., k // 32] - 127)
    blocks = codes.view(experts, outputs, inputs // 32, 16)
    return {"blocks": blocks, "scales": torch.from_numpy(powers.astype(np.uint8))}, wide.transpose(0, 2, 1)
