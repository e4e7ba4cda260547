"""Projections of the same input, as q, k and v, computed as one product of their joined weights.

Model code calls q_proj, k_proj and v_proj one after another with the same tensor object: the first call computes the
whole product, the others take their part of it. Another object is another input and is computed anew, so a model that
does otherwise is merely slower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn


class SharedInput(ABC):
    """The joined product; ``outputs``: its width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.inputs, self.outputs = inputs, outputs
        self._input: torch.Tensor | None = None
        self._output = torch.empty(0)

    @abstractmethod
    def product(self, x: torch.Tensor) -> torch.Tensor:
        """[..., outputs] from x [..., inputs]."""

    def part(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        if x is not self._input:
            self._input, self._output = x, self.product(x)
        part = self._output[..., begin:end]
        if end == self.outputs:  # the last of them: let the memory go
            self._input, self._output = None, self._output[:0]
        return part


class Slice(nn.Module):
    """One of the projections that share an input: outputs ``begin`` to ``end`` of the joined product."""

    def __init__(self, shared: SharedInput, begin: int, end: int) -> None:
        super().__init__()
        self.shared, self.begin, self.end = shared, begin, end
        self.in_features, self.out_features = shared.inputs, end - begin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.part(x, self.begin, self.end)


def bounds(widths: list[int]) -> list[tuple[int, int]]:
    """Where parts of these widths begin and end, side by side."""
    ends = [sum(widths[: k + 1]) for k in range(len(widths))]
    return [(end - width, end) for end, width in zip(ends, widths, strict=True)]
