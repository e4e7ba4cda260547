"""Products with quantized weights in the place of a model's: what replaces its QuantizedLinear modules on a GPU.

- for few rows, whose time is that of reading weights, each weight is widened within the product (nothing is lost);
- for more, where weights are FP8 and the device computes in FP8, rows are rounded to FP8 as well;
- q, k and v are one product; gate and up are one, for few rows with the activation behind it in the same launch.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from workers.torch_engine.cuda import triton_kernels as kernels
from workers.torch_engine.cuda import triton_products as products
from workers.torch_engine.cuda.triton_products import FEW, FEW_ROWS, NO_ACT, Tile
from workers.torch_engine.quantized.linear import QuantizedLinear
from workers.torch_engine.quantized.weights import Fp8Weight, QuantizedWeight, joined
from workers.torch_engine.replace import QKV, Candidate, SeededInput, children_of
from workers.torch_engine.shared_input import SharedInput, Slice, bounds

log = logging.getLogger(__name__)

OTHER = 128 << 20  # bytes that are written between measurements, so that weights come from memory


class Product:
    """y = x W^T + b of rows [n, inputs] in the dtype of x."""

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.tiles = dict.fromkeys((NO_ACT, products.SILU, products.GELU_TANH), FEW[0])
        whole = weight.outputs % 16 == 0 and weight.inputs % 16 == 0  # as torch's product asks
        self._in_fp8 = isinstance(weight, Fp8Weight) and whole and computes_fp8(weight.values.device)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) <= FEW_ROWS:
            return products.widened(rows, self.weight, self.bias, tile=self.tiles[NO_ACT])
        if self._in_fp8 and isinstance(self.weight, Fp8Weight):
            return products.product_in_fp8(rows, self.weight, self.bias)
        return products.widened(rows, self.weight, self.bias)

    def gated(self, rows: torch.Tensor, act: int) -> torch.Tensor:
        """act(gate) * up, where the weight holds gate's outputs before those of up."""
        if len(rows) <= FEW_ROWS:
            return products.widened(rows, self.weight, self.bias, act, self.tiles[act])
        gate, up = self(rows).chunk(2, dim=-1)
        return kernels.gated(gate, up, act)

    def time(self, act: int = NO_ACT) -> None:
        """Find out which tile is the quickest for few rows on this device."""
        self.tiles[act] = _quickest(self.weight, act)


class ProductLinear(nn.Module):
    """In the place of one QuantizedLinear."""

    def __init__(self, product: Product, dtype: torch.dtype) -> None:
        super().__init__()
        self.product = product
        self.in_features, self.out_features = product.weight.inputs, product.weight.outputs
        self.weight: Any = types.SimpleNamespace(dtype=dtype)  # some models ask theirs for it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.out_features)


class ProductMLP(nn.Module):
    """down(act(gate(x)) * up(x))"""

    def __init__(self, gate_up: Product, down: Product, act: int) -> None:
        super().__init__()
        self.gate_up, self.down, self.act = gate_up, down, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.down(self.gate_up.gated(x.reshape(-1, x.shape[-1]), self.act))
        return found.view(*x.shape[:-1], found.shape[-1])


class MergedProduct(SharedInput):
    """q, k and v in one."""

    def __init__(self, product: Product) -> None:
        super().__init__(product.weight.inputs, product.weight.outputs)
        self.joint = product

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return self.joint(x.reshape(-1, self.inputs)).view(*x.shape[:-1], self.outputs)


class ProductSlice(Slice):
    def __init__(self, merged: MergedProduct, begin: int, end: int, dtype: torch.dtype) -> None:
        super().__init__(merged, begin, end)
        self.weight: Any = types.SimpleNamespace(dtype=dtype)


def product_candidates(model: nn.Module, sample: SeededInput) -> Iterator[Candidate]:
    """What takes the place of quantized layers, the largest pieces first."""
    yield from _mlps(model, sample)
    yield from _projections(model, sample)
    for owner, name, child in children_of(model):
        if isinstance(child, QuantizedLinear):
            x = sample(1, 3, child.in_features)
            ours = ProductLinear(_product([child]), x.dtype)
            yield Candidate(_kind("linear", child), owner, (name,), [(ours,)], (x,), (child(x),), left_as="linear")


def _mlps(model: nn.Module, sample: SeededInput) -> Iterator[Candidate]:
    for owner, name, child in children_of(model):
        gate, up, both, down = (
            part if isinstance(part := getattr(child, n, None), QuantizedLinear) else None
            for n in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
        )
        parts = [both] if both is not None else [part for part in (gate, up) if part is not None]
        if down is None or sum(part.out_features for part in parts) != 2 * down.in_features:
            continue
        gate_up = _joint(parts)
        if gate_up is None:
            continue
        x, second = sample(1, 3, parts[0].in_features), _product([down])
        attempts = [(ProductMLP(gate_up, second, act),) for act in (kernels.SILU, kernels.GELU_TANH)]
        yield Candidate(_kind("mlp", down), owner, (name,), attempts, (x,), (child(x),))


def _projections(model: nn.Module, sample: SeededInput) -> Iterator[Candidate]:
    for module in model.modules():
        parts = [part for n in QKV if isinstance(part := getattr(module, n, None), QuantizedLinear)]
        product = _joint(parts) if len(parts) == len(QKV) else None
        if product is None:
            continue
        merged, x = MergedProduct(product), sample(1, 3, parts[0].in_features)
        ends = bounds([part.out_features for part in parts])
        slices = tuple(ProductSlice(merged, *each, x.dtype) for each in ends)
        kind = _kind("qkv", parts[0])
        yield Candidate(kind, module, QKV, [slices], (x,), tuple(part(x) for part in parts), left_as="qkv")


def _kind(kind: str, module: QuantizedLinear) -> str:
    return f"{kind} ({module.quantized.kind})"


def _product(parts: list[QuantizedLinear]) -> Product:
    product = _joint(parts)
    assert product is not None
    return product


def _joint(parts: list[QuantizedLinear]) -> Product | None:
    """One product for all of ``parts``; None where they do not line up."""
    weight = joined([part.quantized for part in parts]) if parts else None
    if weight is None or any((part.bias is None) != (parts[0].bias is None) for part in parts):
        return None
    biases: list[torch.Tensor] = [part.bias for part in parts if part.bias is not None]
    return Product(weight, torch.cat(biases) if biases else None)


def time_products(model: nn.Module) -> None:
    """Choose tiles by measuring; on a GPU, once the model's modules are in place."""
    for module in model.modules():
        if isinstance(module, ProductMLP):
            module.gate_up.time(module.act)
            module.down.time()
        elif isinstance(module, ProductLinear):
            module.product.time()
        elif isinstance(module, ProductSlice):
            module.shared.joint.time()  # type: ignore[attr-defined]


@cache
def computes_fp8(device: torch.device) -> bool:
    """Whether products of FP8 with a scale for each row run on ``device``: where not, weights are widened."""
    if device.type == "cpu":
        return True  # kernels are interpreted
    try:
        small = torch.ones(64, 64, device=device).to(torch.float8_e4m3fn)
        one = torch.ones(64, 1, device=device)
        torch._scaled_mm(small, small.t(), scale_a=one, scale_b=one.t(), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        log.info("no products in FP8 on %s: %s", device, str(error).strip().splitlines()[0])
        return False
    return True


_measured: dict[tuple[Any, ...], Tile] = {}


def _quickest(weight: QuantizedWeight, act: int) -> Tile:
    """Of the tiles for few rows, by shape and kind of weight, measured once."""
    device = weight.tensors()["scale"].device
    key = (weight.kind, weight.outputs, weight.inputs, getattr(weight, "blocks", None), act, device)
    if key not in _measured:
        x = torch.zeros(1, weight.inputs, dtype=torch.bfloat16, device=device)
        other = torch.empty(OTHER, dtype=torch.uint8, device=device)
        took = {tile: milliseconds(partial(products.widened, x, weight, None, act, tile), other.zero_) for tile in FEW}
        _measured[key] = min(took, key=lambda tile: took[tile])
        log.debug("%s: %s", key, took)
    return _measured[key]


def milliseconds(run: Callable[[], Any], between: Callable[[], Any], times: int = 5) -> float:
    """Milliseconds of the device, the least of some, each after ``between``."""
    run()  # compiles
    took = []
    for _ in range(times):
        between()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end))
    return float(min(took))
