"""Products with quantized weights, one by one: how long each takes with each tile, beside the same product in bf16, and
how far it is from what the weights stand for. For choosing tiles, and for a first look at a new card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_part import Part, timed
from benchmarks.stack import Unavailable

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # of an 8B Llama
ROWS = (1, 16, 32, 64, 512, 2048)
COLD = 200 << 20  # bytes of weights in turn: more than a cache holds


def measure(part: Part) -> None:
    """A row for each kind of weight; each entry: microseconds of ours by tile, then of bf16's, then the error."""
    if not part.cuda:
        raise Unavailable("products with quantized weights are measured on a GPU")
    from workers.torch_engine.quantized.weights import MAKERS

    for kind in MAKERS:
        with part.row(kind) as row:
            for name, (outputs, inputs) in SHAPES.items():
                for rows in ROWS:
                    row[f"{name}_{rows}"] = _measured(part, kind, outputs, inputs, rows, gated=name == "gate_up")
            part.note(**{kind: row})


def _measured(part: Part, kind: str, outputs: int, inputs: int, rows: int, gated: bool) -> str:
    from workers.torch_engine.cuda import triton_kernels, triton_products
    from workers.torch_engine.cuda.quantized import Product
    from workers.torch_engine.quantized.weights import MAKERS

    torch.manual_seed(0)
    wide = torch.randn(outputs, inputs, device=part.device, dtype=torch.bfloat16) / inputs**0.5
    x = torch.randn(rows, inputs, device=part.device, dtype=torch.bfloat16)
    weight = MAKERS[kind](wide)
    act = triton_kernels.SILU

    def ours(product: Product) -> torch.Tensor:
        return product.gated(x, act) if gated else product(x)

    def reference(matrix: torch.Tensor) -> torch.Tensor:
        found = torch.nn.functional.linear(x, matrix)
        return triton_kernels.gated(*found.chunk(2, -1), act) if gated else found

    expected = reference(weight.dequantized(torch.bfloat16)).float()
    error = float((ours(Product(weight, None)).float() - expected).norm() / expected.norm())
    products = [Product(weight.copy(), None) for _ in range(COLD // weight.nbytes + 1)]
    told: dict[str, float] = {}
    for tile in triton_products.FEW if rows <= triton_products.FEW_ROWS else (None,):
        for product in products if tile is not None else ():
            product.tiles = dict.fromkeys(product.tiles, tile)
        name = "us" if tile is None else f"{tile.columns}x{tile.warps}"
        told[name] = _microseconds(part, ours, products)
    rate = weight.nbytes / min(told.values()) / 1e6
    told["bf16"] = _microseconds(part, reference, [wide.clone() for _ in range(COLD // wide.nbytes + 1)])
    return ", ".join(f"{name} {value:.1f}" for name, value in told.items()) + f", {rate:.2f} TB/s, error {error:.4f}"


def _microseconds(part: Part, run: Callable[[Any], Any], of: list[Any]) -> float:
    """What one run takes, of a replayed graph of a run for each of ``of``, so that launching does not count and their
    weights come from memory."""
    run(of[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in of:
            run(each)
    return 1e6 * timed(part, graph.replay, 5) / len(of)
