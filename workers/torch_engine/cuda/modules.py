"""Put the Triton kernels and merged products into a transformers model without rewriting it.

The rule is fuse.py's: what is replaced is found by structure, compared on seeded input with what it replaces, and left
to torch where it differs, said in the report. What is replaced:

- q, k and v as one product, gate and up as one product with a gate kernel behind it;
- RMSNorm; and where a decoder layer is the common one (norm, attention, add, norm, MLP, add), each addition together
  with the norm that follows it, the next layer's first norm included;
- `apply_rotary_pos_emb` together with the write of keys and values, where the attention hands on what it rotated.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from workers.torch_engine.attention import NAME
from workers.torch_engine.cpu.modules import ROTARY, with_rotary
from workers.torch_engine.cuda import triton_kernels as kernels
from workers.torch_engine.cuda.attention import TableAttention
from workers.torch_engine.replace import FuseReport

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the original's largest value
QKV = ("q_proj", "k_proj", "v_proj")
TEXT = 21  # tokens of the pass by which whole layers are compared


class FusedNorm(nn.Module):
    """RMSNorm, which may have been computed already, together with the addition that made its input."""

    def __init__(self, weight: nn.Parameter, gain: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = weight  # models ask theirs for dtype and device
        self.gain, self.eps = gain, eps
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ready, self._ready = self._ready, None
        return ready[1] if ready is not None and ready[0] is x else kernels.rms_norm(x, self.gain, self.eps)

    def after(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """x + delta; its norm is kept for the call that asks for it."""
        self._ready = kernels.add_rms_norm(x, delta, self.gain, self.eps)
        return self._ready[0]


class FusedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, down: nn.Linear, act: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.down_proj, self.act = down, act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = F.linear(x.reshape(-1, x.shape[-1]), self.gate_up, self.bias)
        gate, up = both.chunk(2, dim=-1)
        down: torch.Tensor = self.down_proj(kernels.gated(gate, up, self.act))
        return down.view(*x.shape[:-1], down.shape[-1])


class MergedLinear:
    """One product for projections of the same input: the first to be asked computes all (see fuse.SharedInput)."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        self.weight = torch.cat([part.weight for part in parts])
        self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        self._input: torch.Tensor | None = None
        self._output = self.weight.new_empty(0)

    def slice(self, x: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        if x is not self._input:
            self._input, self._output = x, F.linear(x, self.weight, self.bias)
        part = self._output[..., begin:end]
        if end == len(self.weight):  # the last of them: let the memory go
            self._input, self._output = None, self._output[:0]
        return part


class MergedSlice(nn.Module):
    """One of the projections that share an input."""

    def __init__(self, merged: MergedLinear, begin: int, end: int) -> None:
        super().__init__()
        self.merged, self.begin, self.end = merged, begin, end
        self.in_features, self.out_features = merged.weight.shape[1], end - begin
        self.weight = nn.Parameter(merged.weight[begin:end], requires_grad=False)  # a view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merged.slice(x, self.begin, self.end)


@torch.no_grad()
def fuse(model: Any, attention: TableAttention, report: FuseReport) -> None:
    """Replace what can be in ``model``, whose attention is to be ``attention``'s."""
    device = next(model.parameters()).device
    draw = _Draw(model.dtype, device)
    _fuse_norms(model, report, draw)
    _fuse_mlps(model, report, draw)
    _merge_projections(model, report, draw)
    _fuse_layers(model, report)
    _fuse_rotary(model, attention, report, draw)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the weights that were merged


class _Draw:
    """Seeded random input in the model's precision."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype or self.dtype)


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    scale = theirs.float().abs().max().clamp_min(1e-6)
    return bool((ours.float() - theirs.float()).abs().max() / scale < TOLERANCE.get(theirs.dtype, 1e-4))


def _named_children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child


def _fuse_norms(model: nn.Module, report: FuseReport, draw: _Draw) -> None:
    for parent, name, child in _named_children(model):
        weight = getattr(child, "weight", None)
        eps = getattr(child, "variance_epsilon", getattr(child, "eps", None))
        if "RMSNorm" not in type(child).__name__ or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
            continue
        x = draw(3, len(weight)) * 2
        for gain in (weight.detach(), 1 + weight.detach().float()):
            if not isinstance(eps, float) or len(weight) > kernels.WIDEST_NORM:
                continue
            ours = FusedNorm(weight, gain, eps)
            if _equal(ours(x), child(x)):
                setattr(parent, name, ours)
                report.fused["norm"] += 1
                break
        else:
            report.kept[type(child).__name__] += 1


def _linear(module: Any) -> nn.Linear | None:
    return module if type(module) is nn.Linear else None


def _mergeable(parts: list[nn.Linear]) -> bool:
    first = parts[0]
    return all(
        part.in_features == first.in_features
        and part.weight.dtype == first.weight.dtype
        and (part.bias is None) == (first.bias is None)
        for part in parts
    )


def _fuse_mlps(model: nn.Module, report: FuseReport, draw: _Draw) -> None:
    for parent, name, child in _named_children(model):
        gate, up, both, down = (
            _linear(getattr(child, n, None)) for n in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
        )
        if down is None or (both is None and (gate is None or up is None or not _mergeable([gate, up]))):
            continue
        merged = MergedLinear([gate, up]) if gate is not None and up is not None else both
        assert merged is not None
        if len(merged.weight) != 2 * down.in_features:
            continue
        x = draw(1, 3, merged.weight.shape[1])
        theirs = child(x)
        for act in (kernels.SILU, kernels.GELU_TANH):
            ours = FusedMLP(merged.weight, merged.bias, down, act)
            if _equal(ours(x), theirs):
                setattr(parent, name, ours)
                report.fused["mlp"] += 1
                break
        else:
            report.kept[type(child).__name__] += 1


def _merge_projections(model: nn.Module, report: FuseReport, draw: _Draw) -> None:
    for module in model.modules():
        parts = [part for n in QKV if (part := _linear(getattr(module, n, None))) is not None]
        if len(parts) < len(QKV) or not _mergeable(parts):
            continue
        merged = MergedLinear(parts)
        ends = [sum(part.out_features for part in parts[: k + 1]) for k in range(len(parts))]
        slices = [MergedSlice(merged, end - part.out_features, end) for part, end in zip(parts, ends, strict=True)]
        x = draw(1, 3, parts[0].in_features)
        if not all(_equal(ours(x), part(x)) for ours, part in zip(slices, parts, strict=True)):
            report.kept["qkv"] += 1
            continue
        for n, ours in zip(QKV, slices, strict=True):
            setattr(module, n, ours)
        report.fused["qkv"] += 1


# ------------------------------------------------------------------ whole layers

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def _fuse_layers(model: Any, report: FuseReport) -> None:
    """Layers made of the common parts get a forward of ours if it gives what theirs gave in a pass of the model."""
    found: list[tuple[nn.Module, FusedNorm | None]] = []
    for parent in model.modules():
        for stack in (child for child in parent.children() if isinstance(child, nn.ModuleList)):
            norms = [child for child in parent.children() if isinstance(child, FusedNorm)]
            last = norms[0] if len(norms) == 1 else None
            layers = list(stack)
            for layer, following in zip(layers, [*layers[1:], None], strict=True):
                if _is_common(layer):
                    after = last if following is None else getattr(following, "input_layernorm", None)
                    found.append((layer, after if isinstance(after, FusedNorm) else None))
    seen: dict[nn.Module, tuple[dict[str, Any], Any]] = {}
    hooks = [layer.register_forward_hook(_note(seen, layer), with_kwargs=True) for layer, _ in found]
    model.set_attn_implementation("eager")
    try:
        ids = torch.arange(TEXT, device=next(model.parameters()).device)[None]
        model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        forwards = [(layer, _common_forward(layer, following)) for layer, following in found]
        agree = [layer in seen and _gives(forward, *seen[layer]) for layer, forward in forwards]
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(NAME)
    for (layer, forward), agrees in zip(forwards, agree, strict=True):
        if agrees:
            layer.forward = forward
        (report.fused if agrees else report.kept)["layer"] += 1


def _is_common(layer: nn.Module) -> bool:
    children = {name for name, child in layer.named_children() if not isinstance(child, nn.Dropout)}
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    return children == PARTS and all(isinstance(norm, FusedNorm) for norm in norms)


def _note(seen: dict[nn.Module, tuple[dict[str, Any], Any]], layer: nn.Module) -> Callable[..., None]:
    signature = inspect.signature(layer.forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name, {}))
        seen[layer] = (dict(bound), output)

    return hook


def _common_forward(layer: Any, following: FusedNorm | None) -> Callable[..., torch.Tensor]:
    signature = inspect.signature(layer.forward)

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            bound = signature.bind(hidden_states, *args).arguments
            kwargs = {**{n: value for n, value in bound.items() if n != "hidden_states"}, **kwargs}
        attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)[0]
        residual = layer.post_attention_layernorm.after(hidden_states, attended)
        moved: torch.Tensor = layer.mlp(layer.post_attention_layernorm(residual))
        return residual + moved if following is None else following.after(residual, moved)

    return forward


def _gives(ours: Callable[..., Any], arguments: dict[str, Any], theirs: Any) -> bool:
    if not isinstance(theirs, torch.Tensor):
        return False
    try:
        out = ours(**arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # another calling convention: not the layer that we know
        return False
    return isinstance(out, torch.Tensor) and _equal(out, theirs)


# ------------------------------------------------------------------ rotary


def _fuse_rotary(model: nn.Module, attention: TableAttention, report: FuseReport, draw: _Draw) -> None:
    """Attentions get a copy of their forward in which rotary goes to ``attention``; no other model changes."""
    forwards: dict[type, Callable[..., Any] | None] = {}
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
            continue
        if type(module) not in forwards:
            original = forward.__globals__[ROTARY]
            copied = None
            if _rotary_agrees(original, draw):
                copied = with_rotary(forward, attention.rotary(original))
            forwards[type(module)] = copied
        bound = forwards[type(module)]
        if bound is None:
            report.kept["rotary"] += 1
            continue
        module.forward = types.MethodType(bound, module)
        report.fused["rotary"] += 1


def _rotary_agrees(original: Callable[..., Any], draw: _Draw) -> bool:
    """Whether the kernel rotates as ``original`` does."""
    q, k = draw(1, 4, 5, 16), draw(1, 2, 5, 16)
    angles = draw(1, 5, 8, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    keys, values = (torch.zeros(8, 2, 16, dtype=q.dtype, device=q.device) for _ in range(2))
    slots = torch.arange(5, device=q.device)
    try:
        theirs_q, theirs_k = original(q, k, cos, sin)
    except (TypeError, RuntimeError, IndexError, ValueError):  # another signature or shape: not the one we know
        return False
    query, key = q[0].transpose(0, 1), k[0].transpose(0, 1)
    rotated = kernels.rotate_and_store_kv(key, key, keys, values, slots, query, cos[0], sin[0])
    return _equal(rotated, theirs_q[0].transpose(0, 1)) and _equal(keys[:5], theirs_k[0].transpose(0, 1))
