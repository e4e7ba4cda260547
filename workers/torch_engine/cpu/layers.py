"""Whole decoder layers as native calls, where a layer is of the usual build; consecutive ones as a single call.

Between the products of a layer lie only microseconds of arithmetic; in a small model the calls from Python between
them cost more than the arithmetic does, and each may have to wait for the interpreter, which the event loop of the
same process uses meanwhile. So layers whose parts all run natively (modules.py) become one call as far as they follow
each other.

A layer's build is observed in a pass, not taken from its class: each layer's input, output, angles and attention
rule are noted, and a layer is replaced only if the native one gives the same output for the same input. What one pass
cannot show (a scale beyond some position, say) is excluded by the names that the layer's forwards mention: only those
listed below. Layers are joined if one's output was the next one's input, with the same angles, and the model's own
forward mentions only the names below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from workers.native.library import Kernels
from workers.native.packed import Packed
from workers.native.structs import Layer, Pool, Step
from workers.torch_engine.attention import AttentionRule, PagedAttention
from workers.torch_engine.cpu.attention import native_rule, native_step, pool_of
from workers.torch_engine.cpu.modules import NativeMLP, NativeRMSNorm, PackedLinear, PackedProjections
from workers.torch_engine.inputs import StepInputs
from workers.torch_engine.kv_pool import KVPool
from workers.torch_engine.replace import Candidate, FuseReport, like, replace
from workers.torch_engine.shared_input import Slice

_ATTENTION_NAMES = frozenset(
    [
        "ALL_ATTENTION_FUNCTIONS",
        "_attn_implementation",
        "apply_rotary_pos_emb",
        "attention_dropout",
        "attn_logit_softcapping",
        "config",
        "contiguous",
        "eager_attention_forward",
        "get_interface",
        "getattr",
        "head_dim",
        "is_sliding",
        "k_norm",
        "k_proj",
        "layer_idx",
        "num_attention_heads",
        "num_key_value_heads",
        "o_proj",
        "q_norm",
        "q_proj",
        "qkv_proj",
        "reshape",
        "scaling",
        "shape",
        "sliding_window",
        "training",
        "transpose",
        "update",
        "use_rope",
        "v_proj",
        "view",
    ]
)
_LAYER_NAMES = frozenset(
    [
        "input_layernorm",
        "mlp",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "pre_feedforward_layernorm",
        "resid_attn_dropout",
        "resid_mlp_dropout",
        "self_attn",
    ]
)
MODEL_NAMES = frozenset(
    [
        "BaseModelOutputWithPast",
        "DynamicCache",
        "ValueError",
        "_bidirectional_window_overlay",
        "arange",
        "config",
        "copy",
        "create_causal_mask",
        "create_sliding_window_causal_mask",
        "device",
        "dict",
        "embed_tokens",
        "enumerate",
        "get_seq_length",
        "has_sliding_layers",
        "isinstance",
        "layer_types",
        "layers",
        "norm",
        "num_hidden_layers",
        "rotary_emb",
        "set",
        "shape",
        "sliding_window",
        "torch",
        "unsqueeze",
        "use_bidirectional_attention",
    ]
)
# Which norm stands before attention, after it, before the MLP, after it: the three builds there are.
_NORMS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)


@dataclass
class Parts:
    """What a layer consists of."""

    qkv: Packed
    o: Packed
    gate_up: Packed
    down: Packed
    act: int
    norms: list[NativeRMSNorm | None]  # in the order of Layer.norms


@dataclass
class Seen:
    """One layer in the pass that was watched."""

    index: int  # of its attention call
    x: torch.Tensor  # [T, C]
    output: torch.Tensor  # [T, C]
    angles: tuple[torch.Tensor, torch.Tensor]  # cosine and sine, [1, T, rot]
    rule: AttentionRule
    sinks: torch.Tensor | None
    heads: int
    step: StepInputs


class NativeLayers(nn.Module):
    """Takes the place of decoder layers that follow each other; their keys and values go to the pool of
    ``attention``."""

    def __init__(
        self,
        kernels: Kernels,
        attention: PagedAttention[StepInputs],
        layers: list[Layer],
        owners: list[Any],
        group: int,
    ) -> None:
        super().__init__()
        self.kernels, self.attention = kernels, attention
        self.layers = (Layer * len(layers))(*layers)
        self.owners = owners  # of the memory that they point to
        self.group = group  # query heads to a key head
        self._pools: tuple[KVPool | None, Any] = (None, None)

    def forward(
        self, hidden_states: torch.Tensor, *, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        x = hidden_states[0].contiguous()
        out = torch.empty_like(hidden_states)
        cosine, sine = position_embeddings
        self.kernels.layers(self.layers, *self.begin(), cosine[0], sine[0], x, out)
        return out

    def begin(self) -> tuple[Step, Any]:
        """What a call is told of the step, and the pools that it writes to."""
        step, first = self.attention.step, self.attention.next_layers(len(self.layers))
        assert step is not None
        return native_step(step, self.group), self._pools_from(first, step.block_size)

    def _pools_from(self, first: int, block_size: int) -> Any:
        pool = self.attention.pool
        assert pool is not None
        if self._pools[0] is not pool:
            layers = range(first, first + len(self.layers))
            pools = [pool_of(pool.keys[index], pool.values[index], block_size) for index in layers]
            self._pools = pool, (Pool * len(pools))(*pools)
        return self._pools[1]

    def joined(self, following: NativeLayers) -> NativeLayers | None:
        """One for both; None where they cannot share a call."""
        if following.group != self.group:
            return None
        layers, owners = [*self.layers, *following.layers], self.owners + following.owners
        return NativeLayers(self.kernels, self.attention, layers, owners, self.group)


def native_layer(
    kernels: Kernels, attention: PagedAttention[StepInputs], parts: Parts, seen: Seen, rot: int
) -> NativeLayers:
    """A layer by itself. ``rot``: how much of each head is rotated."""
    layer = Layer(
        parts.qkv.linear, parts.o.linear, parts.gate_up.linear, parts.down.linear,
        rule=native_rule(seen.rule, seen.sinks), heads=seen.heads, act=parts.act, rot=rot,
    )  # fmt: skip
    for i, norm in enumerate(parts.norms):
        layer.norms[i] = norm.weight.data_ptr() if norm else None
        layer.eps[i] = norm.eps if norm else 0.0
    group = seen.heads // attention.shapes[seen.index].kv_heads
    return NativeLayers(kernels, attention, [layer], [parts, seen.sinks], group)


class Done(nn.Module):
    """In the place of a layer that an earlier one's call has computed."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class Stack(nn.ModuleList):
    """A model's list of layers. Models take `layers[: n]` in each pass, of which torch would make a new module."""

    def __getitem__(self, index: Any) -> Any:
        return self if index == slice(None, len(self), None) else super().__getitem__(index)


def parts_of(layer: nn.Module) -> Parts | None:
    """What ``layer`` consists of, if it is of the usual build."""
    children = dict(layer.named_children())
    attention, mlp = children.pop("self_attn", None), children.pop("mlp", None)
    if attention is None or not isinstance(mlp, NativeMLP):
        return None
    norms = {name: child for name, child in children.items() if isinstance(child, NativeRMSNorm)}
    if any(name not in norms and not isinstance(c, nn.Dropout | nn.Identity) for name, c in children.items()):
        return None
    build = next((b for b in _NORMS if {name for name in b if name} == set(norms)), None)
    inner = dict(attention.named_children())
    query = inner.pop("q_proj", inner.pop("qkv_proj", None))
    shared = query.shared if isinstance(query, Slice) else query
    qkv = shared.packed if isinstance(shared, PackedProjections | PackedLinear) else None
    o = inner.pop("o_proj", None)
    heads: list[Any] = [inner.pop("q_norm", None), inner.pop("k_norm", None)]
    if build is None or qkv is None or not isinstance(o, PackedLinear) or set(inner) - {"k_proj", "v_proj"}:
        return None
    if any(norm is not None and not isinstance(norm, NativeRMSNorm) for norm in heads):
        return None
    if not (names_of(layer) <= _LAYER_NAMES and names_of(attention) <= _ATTENTION_NAMES):
        return None
    return Parts(qkv, o.packed, mlp.gate_up, mlp.down, mlp.act, [norms.get(n) if n else None for n in build] + heads)


def names_of(module: nn.Module) -> set[str]:
    """Every name that a module's forward mentions."""
    return set(inspect.unwrap(type(module).forward).__code__.co_names)


@torch.no_grad()
def fuse_layers(
    model: nn.Module,
    kernels: Kernels,
    attention: PagedAttention[StepInputs],
    run: Callable[[], Any],
    report: FuseReport,
) -> None:
    """Replace the layers that can be, then join them. ``run`` makes one pass of ``model`` over the pool."""
    parts = {module: found for module in model.modules() if (found := parts_of(module)) is not None}
    seen = _watch(parts, attention, run)
    for owner in list(model.modules()):
        for name, stack in list(owner.named_children()):
            if not isinstance(stack, nn.ModuleList) or not any(layer in seen for layer in stack):
                continue
            originals = list(stack)
            replace(_candidates(stack, parts, seen, kernels, attention), report)
            watched = [seen.get(layer) for layer in originals]
            known = names_of(owner) <= MODEL_NAMES
            follows = [known and a is not None and b is not None and _follows(a, b) for a, b in pairwise(watched)]
            setattr(owner, name, _joined(originals, list(stack), [False, *follows]))


def _candidates(
    stack: nn.ModuleList,
    parts: dict[nn.Module, Parts],
    seen: dict[nn.Module, Seen],
    kernels: Kernels,
    attention: PagedAttention[StepInputs],
) -> Iterator[Candidate]:
    """A native layer for each of usual build, with rotary embedding or without: whichever gives the output seen."""
    for index, layer in enumerate(stack):
        if layer not in parts:
            continue
        found, at = parts[layer], seen.get(layer)
        if at is None or not _fits(attention, found, at):
            yield Candidate("layer", stack, (str(index),), ())
            continue
        attempts = _attempts(kernels, attention, found, at)
        keywords = {"position_embeddings": at.angles}
        yield Candidate("layer", stack, (str(index),), attempts, (at.x[None],), (at.output[None],), keywords)


def _fits(attention: PagedAttention[StepInputs], parts: Parts, seen: Seen) -> bool:
    """Whether the sizes of the parts are those of the attention that was seen."""
    shape = attention.shapes[seen.index]
    sizes = (seen.heads + shape.kv_heads) * shape.key_size + shape.kv_heads * shape.value_size
    norms_fit = all(norm is None or norm.weight.shape[0] == shape.key_size for norm in parts.norms[4:])
    return parts.qkv.outputs == sizes and parts.o.inputs == seen.heads * shape.value_size and norms_fit


def _attempts(
    kernels: Kernels, attention: PagedAttention[StepInputs], parts: Parts, seen: Seen
) -> Iterator[tuple[NativeLayers]]:
    for rot in (seen.angles[0].shape[-1], 0):
        ours = native_layer(kernels, attention, parts, seen, rot)
        attention.begin(seen.step, seen.index)  # the layer of the pool that the call will use
        yield (ours,)


def _follows(before: Seen, after: Seen) -> bool:
    """Whether nothing happens between two layers."""
    same_angles = all(a is b for a, b in zip(before.angles, after.angles, strict=True))
    return same_angles and after.index == before.index + 1 and torch.equal(before.output, after.x)


def _joined(originals: list[nn.Module], layers: list[nn.Module], follows: list[bool]) -> Stack:
    """``layers`` with each native one joined to the one before it where it ``follows``."""
    stack = Stack()
    at = 0  # where the call is that the next layer may join
    for i, (original, layer) in enumerate(zip(originals, layers, strict=True)):
        first = stack[at] if follows[i] else None
        joined = None
        if isinstance(first, NativeLayers) and isinstance(layer, NativeLayers):
            joined = first.joined(layer)
        if joined is not None:
            stack[at] = like(joined, originals[at])
            stack.append(like(Done(), original))
        else:
            stack.append(like(layer, original) if isinstance(layer, NativeLayers) else layer)
            at = i
    return stack


def _watch(
    candidates: dict[nn.Module, Parts], attention: PagedAttention[StepInputs], run: Callable[[], Any]
) -> dict[nn.Module, Seen]:
    """Make a pass and note each candidate's last call, if it attends once and is called as transformers does today."""
    seen: dict[nn.Module, Seen] = {}
    began: dict[nn.Module, tuple[int, torch.Tensor]] = {}
    rules: list[tuple[AttentionRule, torch.Tensor | None, int]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        rules.clear()
        began[module] = (attention.layer, x.clone())

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        index, x = began.pop(module)
        angles = kwargs.get("position_embeddings")
        if not isinstance(output, torch.Tensor) or not isinstance(angles, tuple) or len(rules) != 1:
            return
        step = attention.step
        assert step is not None
        floats = all(angle.dtype == torch.float32 and angle.stride(-1) == 1 for angle in angles)
        if floats and angles[0].stride() == angles[1].stride() and x.dim() == 3:
            seen[module] = Seen(index, x[0], output[0].clone(), angles, *rules[0], step)

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for module in candidates]
    hooks += [module.register_forward_hook(after, with_kwargs=True) for module in candidates]
    attention.watch = lambda rule, sinks, heads: rules.append((rule, sinks, heads))
    try:
        run()
    finally:
        attention.watch = None
        for hook in hooks:
            hook.remove()
    return seen
