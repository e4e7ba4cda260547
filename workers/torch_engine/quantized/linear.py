"""A linear layer whose weight is quantized, by torch alone: what products by kernels take the place of, and what they
are compared with."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from protocol.errors import StartError
from workers.torch_engine.quantized.weights import MAKERS, Fp8Weight, QuantizedWeight
from workers.torch_engine.replace import children_of

ROUTERS = ("gate", "router")  # of a mixture: small, and a rounded one chooses other experts


class QuantizedLinear(nn.Module):
    """y = x W^T + b, the weight widened for the time of a product."""

    def __init__(self, quantized: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized = quantized
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._dtype = dtype

    @property
    def weight(self) -> Any:
        """Some models ask a weight for its dtype and device."""
        return types.SimpleNamespace(dtype=self._dtype, device=self.quantized.tensors()["scale"].device)

    @property
    def in_features(self) -> int:
        return int(self.quantized.inputs)

    @property
    def out_features(self) -> int:
        return int(self.quantized.outputs)

    def _apply(self, function: Any, recurse: bool = True) -> QuantizedLinear:
        """`model.to(device)` moves the weight as well; what it is made of keeps its types."""
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        device = function(torch.empty(0)).device
        if device.type != "meta":
            self.quantized = self.quantized.to(device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.quantized.dequantized(x.dtype), bias)


@torch.no_grad()
def quantize_linears(model: nn.Module, kind: str, device: torch.device) -> int:
    """Round the weights of the linear layers of ``model``, but for its head, to ``kind``; each is on ``device`` only
    for so long. The number of bytes that they take now."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    left = set() if head is None else set(head.modules())  # of several ranks, what says their parts is around it
    taken = 0
    for owner, name, child in children_of(model):
        if type(child) is not nn.Linear or child in left or name in ROUTERS or not _divides(child, kind):
            continue
        small = MAKERS[kind](child.weight.detach().to(device)).to(child.weight.device)
        refuse_not_finite(name, small)
        setattr(owner, name, QuantizedLinear(small, child.bias, child.weight.dtype))
        taken += small.nbytes
    return taken


def _divides(linear: nn.Linear, kind: str) -> bool:
    """Whether groups of inputs are whole, and products in FP8, which take 16 inputs and outputs at a time, can be."""
    return linear.in_features % (32 if kind == "int4" else 16) == 0 and linear.out_features % 16 == 0


def refuse_not_finite(name: str, weight: QuantizedWeight) -> None:
    """StartError for scales that hold NaN or infinities, as they do where a weight did, and for codes that are NaN."""
    whole = bool(weight.tensors()["scale"].isfinite().all())
    if isinstance(weight, Fp8Weight):
        whole = whole and not bool((weight.values.view(torch.uint8) & 127 == 127).any())
    if not whole:
        raise StartError(f"the weights are damaged: {name} holds values that are no numbers; fetch the model again")
