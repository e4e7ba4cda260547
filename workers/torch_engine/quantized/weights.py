"""Weights of linear layers in few bits: how they lie in memory here, whatever format a checkpoint stored them in.

Two kinds: 8-bit floating point (Fp8Weight), and integers of 8 or 4 bits (IntWeight). Both know what they stand for
(``dequantized``), which is what all products are compared with; kernels read their tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch

FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0  # largest number of e4m3
BLOCK = 128  # inputs, and outputs, that share a scale in the block form of FP8
GROUP = 128  # inputs that share a scale in int4 that is made here, and the most that do in any
INT4_ZERO = 8  # code that stands for zero where no zeros are stored


class QuantizedWeight(ABC):
    """A matrix [outputs, inputs]."""

    kind: str  # fp8, int8, int4
    outputs: int
    inputs: int

    @abstractmethod
    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[outputs, inputs]: the numbers that it stands for, rounded once to ``dtype``."""

    @abstractmethod
    def _joined(self, others: Sequence[Self]) -> Self | None: ...

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), torch.Tensor)}  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Self:
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})  # type: ignore[type-var]

    def copy(self) -> Self:
        return replace(self, **{name: tensor.clone() for name, tensor in self.tensors().items()})  # type: ignore[type-var]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


@dataclass(frozen=True)
class Fp8Weight(QuantizedWeight):
    """``values`` e4m3 [outputs, inputs]; ``scale`` float32, by which they are multiplied: [outputs, 1], or in blocks of
    BLOCK x BLOCK [ceil(outputs / BLOCK), ceil(inputs / BLOCK)].

    ``input_scale`` float32 []: by which inputs are to be divided before they are rounded; None: found for each row (in
    the block form: and each BLOCK of inputs).
    """

    values: torch.Tensor
    scale: torch.Tensor
    blocks: bool = False
    input_scale: torch.Tensor | None = None
    kind = "fp8"

    @property
    def outputs(self) -> int:  # type: ignore[override]
        return self.values.shape[0]

    @property
    def inputs(self) -> int:  # type: ignore[override]
        return self.values.shape[1]

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        scale = self.scale
        if self.blocks:
            scale = scale.repeat_interleave(BLOCK, 0)[: self.outputs].repeat_interleave(BLOCK, 1)[:, : self.inputs]
        return (self.values.float() * scale).to(dtype)

    def rounded_inputs(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [rows, inputs] as a product in FP8 sees it, in the dtype of x."""
        if self.input_scale is not None:
            wide = x.float() / self.input_scale
            return (wide.clamp(-FP8_MOST, FP8_MOST).to(FP8).float() * self.input_scale).to(x.dtype)
        size = BLOCK if self.blocks else self.inputs
        wide = torch.nn.functional.pad(x.float(), (0, -self.inputs % size)).view(len(x), -1, size)
        scale = (wide.abs().amax(-1, keepdim=True) / FP8_MOST).clamp_min(1e-12)
        return ((wide / scale).to(FP8).float() * scale).flatten(1)[:, : self.inputs].to(x.dtype)

    def _joined(self, others: Sequence[Fp8Weight]) -> Fp8Weight | None:
        parts = (self, *others)
        if self.blocks and any(part.outputs % BLOCK for part in parts[:-1]):
            return None
        if not all(_equal(part.input_scale, self.input_scale) for part in parts):
            return None
        values, scale = (torch.cat([getattr(part, n) for part in parts]) for n in ("values", "scale"))
        return replace(self, values=values, scale=scale)


@dataclass(frozen=True)
class IntWeight(QuantizedWeight):
    """(code - zero) * scale, where ``group`` adjacent inputs share zero and scale.

    ``codes``: int8 [outputs, inputs] of 8 bits, which have no zeros, or uint8 [outputs, inputs / 2] of 4: in each group
    the low half of byte j is input j, the high half input j + group / 2. ``scale`` of any floating dtype and ``zeros``
    uint8 (None: all INT4_ZERO): [outputs, inputs / group]. ``order`` int64 [inputs]: which input of the layer comes at
    each place, None: as they are.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    group: int
    bits: int = 4
    zeros: torch.Tensor | None = None
    order: torch.Tensor | None = None

    @property
    def kind(self) -> str:  # type: ignore[override]
        return f"int{self.bits}"

    @property
    def outputs(self) -> int:  # type: ignore[override]
        return self.codes.shape[0]

    @property
    def inputs(self) -> int:  # type: ignore[override]
        return self.codes.shape[1] * 8 // self.bits

    @property
    def is_int8_by_output(self) -> bool:
        return self.bits == 8 and self.group == self.inputs and self.order is None

    @classmethod
    def of_codes(
        cls, codes: torch.Tensor, scale: torch.Tensor, group: int, zeros: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
    ) -> Self:  # fmt: skip
        """Of 4-bit ``codes`` [outputs, inputs], one each, 0 to 15."""
        low, high = codes.to(torch.uint8).view(len(codes), -1, 2, group // 2).unbind(2)
        return cls((low | high << 4).flatten(1).contiguous(), scale, group, 4, zeros, order)

    def unpacked(self) -> torch.Tensor:
        """int16 [outputs, inputs]: codes less their zeros, in the order of memory."""
        if self.bits == 8:
            return self.codes.to(torch.int16)
        pairs = self.codes.view(self.outputs, -1, self.group // 2)
        codes = torch.cat([pairs & 15, pairs >> 4], -1).to(torch.int16)
        return (codes - (INT4_ZERO if self.zeros is None else self.zeros.to(torch.int16)[..., None])).flatten(1)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        grouped = self.unpacked().view(self.outputs, -1, self.group)
        wide = (grouped.float() * self.scale.float()[..., None]).flatten(1).to(dtype)
        if self.order is None:
            return wide
        return torch.empty_like(wide).index_copy_(1, self.order, wide)

    def _joined(self, others: Sequence[IntWeight]) -> IntWeight | None:
        parts = (self, *others)
        alike = [p.bits == self.bits and p.group == self.group and _equal(p.order, self.order) for p in parts]
        if not all(alike):
            return None
        zeros = None
        if any(part.zeros is not None for part in parts):
            zeros = torch.cat(
                [torch.full_like(p.scale, INT4_ZERO, dtype=torch.uint8) if p.zeros is None else p.zeros for p in parts]
            )
        codes, scale = (torch.cat([getattr(part, n) for part in parts]) for n in ("codes", "scale"))
        return replace(self, codes=codes, scale=scale, zeros=zeros)


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """One weight for several products of the same input; None where they do not line up."""
    first, *others = parts
    if any(type(part) is not type(first) or part.inputs != first.inputs for part in others):
        return None
    return first._joined(others)


# ------------------------------------------------------------------ made of wide weights


def fp8_of(weight: torch.Tensor) -> Fp8Weight:
    """Of any precision: one scale for each output."""
    wide = weight.float()
    scale = (wide.abs().amax(1, keepdim=True) / FP8_MOST).clamp_min(1e-12)
    return Fp8Weight((wide / scale).clamp(-FP8_MOST, FP8_MOST).to(FP8), scale)


def int8_of(weight: torch.Tensor) -> IntWeight:
    wide = weight.float()
    scale = (wide.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
    return IntWeight((wide / scale).round().to(torch.int8), scale, weight.shape[1], 8)


def int4_of(weight: torch.Tensor) -> IntWeight:
    """One scale and one zero for each GROUP of inputs, or 64 or 32 where these divide them: 16 steps from the least to
    the largest of them and zero."""
    group = next(size for size in (GROUP, 64, 32) if weight.shape[1] % size == 0)
    wide = weight.float().view(len(weight), -1, group)
    least, most = wide.amin(-1).clamp_max(0), wide.amax(-1).clamp_min(0)
    scale = ((most - least) / 15).clamp_min(1e-7).to(weight.dtype)
    zeros = (-least / scale.float()).round().clamp(0, 15)
    codes = (wide / scale.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return IntWeight.of_codes(codes.flatten(1), scale, group, zeros.to(torch.uint8))


MAKERS = {"fp8": fp8_of, "int8": int8_of, "int4": int4_of}
