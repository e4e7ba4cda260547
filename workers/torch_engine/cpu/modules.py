"""Put the native CPU kernels into a transformers model without rewriting it.

Every replacement is found by structure, built, and compared with what it replaces on seeded input; one that
differs is left to torch and named in the report. Class names are no evidence: gemma's RMSNorm multiplies by
1 + w, olmo2 casts elsewhere. What is replaced:

- Linear and Conv1D: packed weights in the checkpoint's precision, fp32 arithmetic; a tied embedding reads
  the same packed weights, so nothing is stored twice;
- the experts of a mixture (experts.py);
- RMSNorm; gated MLPs (gate and up as one product); q, k and v as one product;
- `apply_rotary_pos_emb`, in a copy of the attention's forward, so that no other model in the process changes;
- whole decoder layers, once there is a pool to attend to (layers.py).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from workers.native.library import ACTIVATIONS, PANEL, Kernels, Packed
from workers.torch_engine.cpu.experts import fuse_experts
from workers.torch_engine.replace import FuseReport, agrees


class PackedLinear(nn.Module):
    """y = x W^T + b over any leading dimensions, float32 in and out."""

    def __init__(self, kernels: Kernels, packed: Packed) -> None:
        super().__init__()
        self.kernels, self.packed = kernels, packed
        self.in_features, self.out_features = packed.inputs, packed.outputs
        # Some models ask a weight for its dtype. No tensor: products with one on meta are garbage, not errors.
        self.weight: Any = types.SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        out = torch.empty(rows.shape[0], self.out_features)
        self.kernels.linear(rows, self.packed, out)
        return out.view(*x.shape[:-1], self.out_features)


class PackedEmbedding(nn.Module):
    """The embedding that is tied to a packed head: one lane of one panel is a token's row."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.packed.weight[ids // PANEL, :, ids % PANEL].float()
        if self.packed.scale is not None:
            rows *= self.packed.scale[ids, None]
        return rows


class NativeRMSNorm(nn.Module):
    def __init__(self, kernels: Kernels, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.kernels, self.eps = kernels, eps
        self.weight = nn.Parameter(weight, requires_grad=False)  # a parameter: models ask theirs for dtype and device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty(rows.shape)
        return self.kernels.rms_norm(rows, self.weight, self.eps, out).view(x.shape)


class NativeMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one pass. ``act`` indexes ACTIVATIONS."""

    def __init__(self, kernels: Kernels, gate_up: Packed, down: Packed, act: int) -> None:
        super().__init__()
        self.kernels, self.gate_up, self.down, self.act = kernels, gate_up, down, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        count, width = rows.shape[0], self.down.inputs
        hidden = self.kernels.gate_up(rows, self.gate_up, self.act, torch.empty(count, width))
        out = self.kernels.linear(hidden, self.down, torch.empty(count, self.down.outputs))
        return out.view(*x.shape[:-1], self.down.outputs)


class SharedInput:
    """One product for projections of the same input: the first to be asked computes all of them.

    Model code calls q_proj, k_proj, v_proj one after another with the same tensor object; another object
    is another input and is computed anew, so a model that does otherwise is merely slower.
    """

    def __init__(self, kernels: Kernels, packed: Packed) -> None:
        self.kernels, self.packed = kernels, packed
        self.input: torch.Tensor | None = None
        self.output = torch.empty(0)

    def slice(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        if x is not self.input:
            rows = x.reshape(-1, self.packed.inputs)
            out = self.kernels.linear(rows, self.packed, torch.empty(rows.shape[0], self.packed.outputs))
            self.input, self.output = x, out.view(*x.shape[:-1], self.packed.outputs)
        part = self.output[..., begin:end]
        if end == self.packed.outputs:  # the last of them: let the memory go
            self.input, self.output = None, self.output[:0]
        return part


class Slice(nn.Module):
    """One of the projections that share an input."""

    def __init__(self, shared: SharedInput, begin: int, end: int) -> None:
        super().__init__()
        self.shared, self.begin, self.end = shared, begin, end
        self.in_features, self.out_features = shared.packed.inputs, end - begin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.slice(x, self.begin, self.end)


@torch.no_grad()
def fuse(model: nn.Module, kernels: Kernels, report: FuseReport, *, int8: bool = False) -> None:
    """Replace what can be in ``model`` (on the CPU, any floating dtype); all else becomes float32."""
    generator = torch.Generator().manual_seed(0)
    fuse_experts(model, kernels, report, generator, int8)
    _pack_linears(model, kernels, report, generator, int8)
    model.float()
    _fuse_norms(model, kernels, report, generator)
    _fuse_mlps(model, kernels, report, generator)
    _merge_projections(model, kernels, report)
    _fuse_rotary(model, kernels, report, generator)


def _named_children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child


def _pack_linears(
    model: nn.Module, kernels: Kernels, report: FuseReport, generator: torch.Generator, int8: bool
) -> None:
    packed_by_weight: dict[int, Packed] = {}  # a weight tied to several modules is packed once
    for parent, name, child in _named_children(model):
        if type(child) is nn.Linear:
            weight, bias = child.weight, child.bias
        elif type(child) is Conv1D:
            weight, bias = child.weight.t(), child.bias
        else:
            continue
        packed = packed_by_weight.get(id(child.weight)) or Packed(weight.detach(), bias, int8=int8)
        ours = PackedLinear(kernels, packed)
        x = torch.randn(3, packed.inputs, generator=generator)
        theirs = torch.nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
        if not int8 and not agrees(ours(x), theirs):
            report.kept["linear"] += 1
            continue
        packed_by_weight[id(child.weight)] = packed
        setattr(parent, name, ours)
        report.fused["linear" + (" (int8)" if int8 else "")] += 1
    for parent, name, child in _named_children(model):
        if type(child) is nn.Embedding and id(child.weight) in packed_by_weight:
            setattr(parent, name, PackedEmbedding(packed_by_weight[id(child.weight)]))
            report.fused["tied embedding"] += 1


def _fuse_norms(model: nn.Module, kernels: Kernels, report: FuseReport, generator: torch.Generator) -> None:
    for parent, name, child in _named_children(model):
        weight = getattr(child, "weight", None)
        eps = getattr(child, "variance_epsilon", getattr(child, "eps", None))
        if "RMSNorm" not in type(child).__name__ or not isinstance(weight, torch.Tensor) or weight.dim() != 1:
            continue
        x = torch.randn(3, weight.shape[0], generator=generator) * 2
        for scale in (weight.detach(), 1 + weight.detach()):
            ours = NativeRMSNorm(kernels, scale.contiguous(), float(eps or 0))
            if isinstance(eps, float) and agrees(ours(x), child(x)):
                setattr(parent, name, ours)
                report.fused["norm"] += 1
                break
        else:
            report.kept[type(child).__name__] += 1


def _fuse_mlps(model: nn.Module, kernels: Kernels, report: FuseReport, generator: torch.Generator) -> None:
    for parent, name, child in _named_children(model):
        down = getattr(child, "down_proj", None)
        if not isinstance(down, PackedLinear):
            continue
        gate, up, both = (getattr(child, n, None) for n in ("gate_proj", "up_proj", "gate_up_proj"))
        if isinstance(gate, PackedLinear) and isinstance(up, PackedLinear):
            gate_up = Packed.concat([gate.packed, up.packed])
        else:
            gate_up = both.packed if isinstance(both, PackedLinear) else None
        if gate_up is None or gate_up.outputs != 2 * down.packed.inputs or down.packed.inputs % PANEL:
            continue
        x = torch.randn(1, 3, gate_up.inputs, generator=generator)
        theirs = child(x)
        for act in range(len(ACTIVATIONS)):
            ours = NativeMLP(kernels, gate_up, down.packed, act)
            if agrees(ours(x), theirs):
                setattr(parent, name, ours)
                report.fused["mlp"] += 1
                break
        else:
            report.kept[type(child).__name__] += 1


def _merge_projections(model: nn.Module, kernels: Kernels, report: FuseReport) -> None:
    for module in model.modules():
        parts = [getattr(module, n, None) for n in ("q_proj", "k_proj", "v_proj")]
        if not all(isinstance(p, PackedLinear) for p in parts):
            continue
        packed = Packed.concat([p.packed for p in parts])  # type: ignore[union-attr]
        if packed is None:
            continue
        shared, begin = SharedInput(kernels, packed), 0
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            end = begin + part.out_features  # type: ignore[union-attr]
            setattr(module, name, Slice(shared, begin, end))
            begin = end
        report.fused["qkv"] += 1


ROTARY = "apply_rotary_pos_emb"


def _native_rotary(kernels: Kernels, original: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape[2], x.shape[1], x.shape[3])
        kernels.rotary(x[0].transpose(0, 1), cos[0], sin[0], out)
        return out.transpose(0, 1)[None]

    def apply_rotary(q, k, cos, sin, *args, **kwargs):  # type: ignore[no-untyped-def]
        plain = not args and not kwargs and q.shape[0] == 1 and cos.dim() == 3 and q.shape[-1] == cos.shape[-1]
        if plain and q.stride(-1) == 1 and k.stride(-1) == 1 and cos.stride() == sin.stride() and cos.stride(-1) == 1:
            return rotate(q, cos, sin), rotate(k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    return apply_rotary


def _rotary_agrees(ours: Callable[..., Any], original: Callable[..., Any], generator: torch.Generator) -> bool:
    q, k = (torch.randn(1, heads, 5, 16, generator=generator) for heads in (4, 2))
    angles = torch.randn(1, 5, 8, generator=generator).repeat(1, 1, 2)
    try:
        theirs = original(q, k, angles.cos(), angles.sin())
    except (TypeError, RuntimeError, IndexError):  # another signature or shape: not the function we know
        return False
    return all(agrees(a, b) for a, b in zip(ours(q, k, angles.cos(), angles.sin()), theirs, strict=True))


def with_rotary(forward: types.FunctionType, ours: Callable[..., Any]) -> types.FunctionType:
    """A copy of ``forward`` that calls ``ours`` for its rotary embedding; no other model in the process changes."""
    known = {**forward.__globals__, ROTARY: ours}
    copied = types.FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _fuse_rotary(model: nn.Module, kernels: Kernels, report: FuseReport, generator: torch.Generator) -> None:
    forwards: dict[type, Callable[..., Any] | None] = {}
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
            continue
        if type(module) not in forwards:
            original = forward.__globals__[ROTARY]
            ours = _native_rotary(kernels, original)
            copied = None
            if _rotary_agrees(ours, original, generator):
                copied = with_rotary(forward, ours)
            forwards[type(module)] = copied
        bound = forwards[type(module)]
        if bound is None:
            report.kept["rotary"] += 1
            continue
        module.forward = types.MethodType(bound, module)
        report.fused["rotary"] += 1
