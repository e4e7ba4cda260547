"""Put the native CPU kernels into a transformers model: what replaces its modules (see replace.py for how).

- Linear and Conv1D: packed weights in the checkpoint's precision, fp32 arithmetic; a tied embedding reads
  the same packed weights, so nothing is stored twice;
- the experts of a mixture (experts.py);
- RMSNorm; gated MLPs (gate and up as one product); q, k and v as one product;
- `apply_rotary_pos_emb`;
- whole decoder layers, once there is a pool to attend to (layers.py).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from workers.native.library import ACTIVATIONS, Kernels
from workers.native.packed import GROUPS, Packed
from workers.native.structs import PANEL
from workers.torch_engine.cpu.experts import expert_candidates
from workers.torch_engine.quantized.linear import QuantizedLinear
from workers.torch_engine.quantized.weights import INT4_ZERO, IntWeight, QuantizedWeight
from workers.torch_engine.replace import (
    QKV,
    Candidate,
    FuseReport,
    SeededInput,
    agrees,
    children_of,
    norm_candidates,
    replace,
    rotary_candidates,
)
from workers.torch_engine.shared_input import SharedInput, Slice, bounds


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
    """The embedding that is tied to a packed head: a token's row is one column of one panel."""

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


class PackedProjections(SharedInput):
    """q, k and v as one packed weight."""

    def __init__(self, kernels: Kernels, packed: Packed) -> None:
        super().__init__(packed.inputs, packed.outputs)
        self.kernels, self.packed = kernels, packed

    def product(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.inputs)
        out = self.kernels.linear(rows, self.packed, torch.empty(rows.shape[0], self.outputs))
        return out.view(*x.shape[:-1], self.outputs)


@torch.no_grad()
def fuse(model: nn.Module, kernels: Kernels, report: FuseReport, *, int8: bool = False) -> None:
    """Replace what can be in ``model`` (on the CPU, any floating dtype); all else becomes float32."""
    sample = SeededInput()
    replace(expert_candidates(model, kernels, sample.generator, int8), report)
    replace(_linears(model, kernels, sample, int8), report)
    model.float()
    replace(norm_candidates(model, sample, lambda _, gain, eps: NativeRMSNorm(kernels, gain.contiguous(), eps)), report)
    replace(_mlps(model, kernels, sample), report)
    replace(_projections(model, kernels), report)
    replace(rotary_candidates(model, lambda original: _same_rotary(kernels, original, sample)), report)


def _linears(model: nn.Module, kernels: Kernels, sample: SeededInput, int8: bool) -> Iterator[Candidate]:
    packed_by_weight: dict[int, Packed] = {}  # a weight tied to several modules is packed once
    for owner, name, child in children_of(model):
        if isinstance(child, QuantizedLinear):
            yield _quantized_candidate(owner, name, child, kernels, sample)
            continue
        if type(child) is nn.Linear:
            weight, bias = child.weight, child.bias
        elif type(child) is Conv1D:
            weight, bias = child.weight.t(), child.bias
        else:
            continue
        packed = packed_by_weight.get(id(child.weight)) or Packed(weight.detach(), bias, int8=int8)
        ours = PackedLinear(kernels, packed)
        x = sample(3, packed.inputs)
        theirs = torch.nn.functional.linear(x, weight.float(), None if bias is None else bias.float())
        kind = "linear" + (" (int8)" if int8 else "")  # int8 gives other results by design
        expected = None if int8 else (theirs,)
        yield Candidate(kind, owner, (name,), [(ours,)], (x,), expected, left_as="linear")
        if getattr(owner, name) is ours:
            packed_by_weight[id(child.weight)] = packed
    for owner, name, child in children_of(model):
        if type(child) is nn.Embedding and id(child.weight) in packed_by_weight:
            embedding = PackedEmbedding(packed_by_weight[id(child.weight)])
            yield Candidate("tied embedding", owner, (name,), [(embedding,)])


def _quantized_candidate(
    owner: nn.Module, name: str, child: QuantizedLinear, kernels: Kernels, sample: SeededInput
) -> Candidate:
    """A weight that is in few bits already stays so where there is a product for it: nothing is rounded. Others are
    widened once, as they would be in each product."""
    weight, kind = child.quantized, "linear"
    packed = _packed(weight, child.bias)
    if packed is not None:
        kind = f"linear ({weight.kind})"
    else:
        packed = Packed(weight.dequantized(child.weight.dtype), child.bias)
    x = sample(3, weight.inputs)
    return Candidate(kind, owner, (name,), [(PackedLinear(kernels, packed),)], (x,), (child(x),), left_as="linear")


def _packed(weight: QuantizedWeight, bias: torch.Tensor | None) -> Packed | None:
    """None: no product takes it as it is (inputs in another order, groups of another size, FP8)."""
    if not isinstance(weight, IntWeight) or weight.order is not None:
        return None
    if weight.is_int8_by_output:
        return Packed.of_int8(weight.codes, weight.scale, bias)
    if weight.bits != 4 or weight.group not in GROUPS or weight.inputs % weight.group:
        return None
    zeros = INT4_ZERO if weight.zeros is None else weight.zeros.float()
    scale = weight.scale.float()
    return Packed.of_int4(weight.codes, scale, -zeros * scale, weight.group, bias)


def _mlps(model: nn.Module, kernels: Kernels, sample: SeededInput) -> Iterator[Candidate]:
    for owner, name, child in children_of(model):
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
        x = sample(1, 3, gate_up.inputs)
        attempts = [(NativeMLP(kernels, gate_up, down.packed, act),) for act in range(len(ACTIVATIONS))]
        yield Candidate("mlp", owner, (name,), attempts, (x,), (child(x),))


def _projections(model: nn.Module, kernels: Kernels) -> Iterator[Candidate]:
    for module in model.modules():
        parts = [part for name in QKV if isinstance(part := getattr(module, name, None), PackedLinear)]
        packed = Packed.concat([part.packed for part in parts]) if len(parts) == len(QKV) else None
        if packed is None:
            continue
        shared = PackedProjections(kernels, packed)  # the same sums: there is nothing to compare
        slices = tuple(Slice(shared, *ends) for ends in bounds([part.out_features for part in parts]))
        yield Candidate("qkv", module, QKV, [slices])


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


def _same_rotary(kernels: Kernels, original: Callable[..., Any], sample: SeededInput) -> Callable[..., Any] | None:
    """The native function if it rotates as ``original`` does."""
    ours = _native_rotary(kernels, original)
    q, k = (sample(1, heads, 5, 16) for heads in (4, 2))
    angles = sample(1, 5, 8).repeat(1, 1, 2)
    try:
        theirs = original(q, k, angles.cos(), angles.sin())
    except (TypeError, RuntimeError, IndexError):  # another signature or shape: not the function we know
        return None
    same = all(agrees(a, b) for a, b in zip(ours(q, k, angles.cos(), angles.sin()), theirs, strict=True))
    return ours if same else None
