"""Weights as the kernels read them: in panels of 16 outputs."""

from __future__ import annotations

import ctypes

import torch

from workers.native.structs import PANEL, Linear

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}  # uint8: two of 4 bits
GROUPS = (16, 32, 64, 128, 256)  # inputs of int4 that may share a scale


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Packed:
    """A weight [N, K] in panels of 16 outputs, [ceil(N/16), K, 16], in the precision that it came in.

    float16 is widened to float32 (no lossless shorter form that is quick to widen); int8 is made from any
    precision on request, symmetric, one scale per output. int4 has scales of groups of inputs (of_int4).
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, int8: bool = False) -> None:
        outputs, inputs = weight.shape
        scale: torch.Tensor | None = None
        if int8:
            wide = weight.float()
            scale = (wide.abs().amax(dim=1) / 127).clamp_min(1e-12)
            weight = (wide / scale[:, None]).round().to(torch.int8)
            scale = torch.nn.functional.pad(scale, (0, -outputs % PANEL)).contiguous()
        elif weight.dtype == torch.float16:
            weight = weight.float()
        if outputs % PANEL:
            weight = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % PANEL))
        panels = weight.view(-1, PANEL, inputs).transpose(1, 2).contiguous()
        self._keep(panels, outputs, scale, None if bias is None else bias.detach().float().contiguous())

    @classmethod
    def of_int8(cls, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Packed:
        """Of codes int8 [N, K] and scales [N, 1] as they are."""
        outputs, inputs = codes.shape
        more = -outputs % PANEL
        rows = torch.nn.functional.pad(codes, (0, 0, 0, more))
        scales = torch.nn.functional.pad(scale.float().flatten(), (0, more)).contiguous()
        packed = cls.__new__(cls)
        panels = rows.view(-1, PANEL, inputs).transpose(1, 2).contiguous()
        packed._keep(panels, outputs, scales, None if bias is None else bias.detach().float().contiguous())
        return packed

    @classmethod
    def of_int4(
        cls, codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, group: int, bias: torch.Tensor | None
    ) -> Packed:
        """Of pairs of 4-bit codes uint8 [N, K / 2] (in each group, input j in the low half of byte j and j + group / 2
        in the high one), which stand for code * scale + shift, both [N, K / group]."""
        if group not in GROUPS:
            raise ValueError(f"groups of {group} inputs have no product")

        def panels(rows: torch.Tensor) -> torch.Tensor:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % PANEL))
            return rows.view(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()

        packed = cls.__new__(cls)
        bias = None if bias is None else bias.detach().float().contiguous()
        packed._keep(panels(codes), len(codes), panels(scale.float()), bias, panels(shift.float()), group)
        return packed

    def _keep(
        self, panels: torch.Tensor, outputs: int, scale: torch.Tensor | None, bias: torch.Tensor | None,
        shift: torch.Tensor | None = None, group: int = 0,
    ) -> None:  # fmt: skip
        self.weight, self.outputs, self.inputs = panels, outputs, panels.shape[1] * (2 if group else 1)
        self.scale, self.bias, self.shift, self.group = scale, bias, shift, group
        self.kind = KINDS[panels.dtype]
        self.linear = Linear(
            panels.data_ptr(), pointer(scale), pointer(bias), outputs, self.inputs, self.kind, pointer(shift), group
        )
        self.pointer = ctypes.addressof(self.linear)

    def unpacked(self) -> torch.Tensor:
        """float32 [N, K]: the weight as it is computed with."""
        if self.scale is not None and self.shift is not None:
            pairs = self.weight.view(len(self.weight), -1, self.group // 2, PANEL)  # [panels, groups, half, 16]
            codes = torch.cat([pairs & 15, pairs >> 4], 2).float()
            wide = codes * self.scale[:, :, None] + self.shift[:, :, None]
            return wide.flatten(1, 2).transpose(1, 2).reshape(-1, self.inputs)[: self.outputs]
        rows = self.weight.float().transpose(1, 2).reshape(-1, self.inputs)[: self.outputs]
        return rows if self.scale is None else rows * self.scale[: self.outputs, None]

    @classmethod
    def concat(cls, parts: list[Packed]) -> Packed | None:
        """One for several products of the same input; None where their panels do not line up."""
        first = parts[0]
        if any((p.kind, p.inputs, p.group) != (first.kind, first.inputs, first.group) for p in parts):
            return None
        if any(p.outputs % PANEL for p in parts[:-1]):
            return None
        whole = cls.__new__(cls)
        biases = [torch.zeros(p.outputs) if p.bias is None else p.bias for p in parts]
        whole._keep(
            torch.cat([p.weight for p in parts]),
            sum(p.outputs for p in parts),
            None if first.scale is None else torch.cat([p.scale for p in parts if p.scale is not None]),
            torch.cat(biases) if any(p.bias is not None for p in parts) else None,
            None if first.shift is None else torch.cat([p.shift for p in parts if p.shift is not None]),
            first.group,
        )
        return whole
