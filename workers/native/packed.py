"""Weights as the kernels read them: in panels of 16 outputs."""

from __future__ import annotations

import ctypes

import torch

from workers.native.structs import PANEL, Linear

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Packed:
    """A weight [N, K] in panels of 16 outputs, [ceil(N/16), K, 16], in the precision that it came in.

    float16 is widened to float32 (no lossless shorter form that is quick to widen); int8 is made from any
    precision on request, symmetric, one scale per output.
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

    def _keep(self, panels: torch.Tensor, outputs: int, scale: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self.weight, self.outputs, self.inputs = panels, outputs, panels.shape[1]
        self.scale, self.bias, self.kind = scale, bias, KINDS[panels.dtype]
        self.linear = Linear(panels.data_ptr(), pointer(scale), pointer(bias), self.outputs, self.inputs, self.kind)
        self.pointer = ctypes.addressof(self.linear)

    def unpacked(self) -> torch.Tensor:
        """float32 [N, K]: the weight as it is computed with."""
        rows = self.weight.float().transpose(1, 2).reshape(-1, self.inputs)[: self.outputs]
        return rows if self.scale is None else rows * self.scale[: self.outputs, None]

    @classmethod
    def concat(cls, parts: list[Packed]) -> Packed | None:
        """One for several products of the same input; None where their panels do not line up."""
        first = parts[0]
        if any(p.kind != first.kind or p.inputs != first.inputs for p in parts):
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
        )
        return whole
