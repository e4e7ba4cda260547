"""Put the Triton kernels and merged products into a transformers model: what replaces its modules (see replace.py for
how).

- q, k and v as one product, gate and up as one product with a gate kernel behind it;
- RMSNorm; and where a decoder layer is the common one (norm, attention, add, norm, MLP, add), each addition together
  with the norm that follows it, the next layer's first norm included;
- mixture-of-experts as products grouped by expert (triton_experts.py);
- `apply_rotary_pos_emb` together with the write of keys and values, where the attention hands on what it rotated.

Over 400 lines: what replaces a module stands beside what finds it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from workers.torch_engine.attention import NAME
from workers.torch_engine.cuda import triton_kernels as kernels
from workers.torch_engine.cuda.attention import TableAttention
from workers.torch_engine.cuda.quantized import product_candidates, time_products
from workers.torch_engine.cuda.triton_experts import (
    CLAMPED,
    GELU_TANH,
    MOST_EXPERTS,
    SILU,
    choose_experts,
    experts_sum,
    gate_up_rows,
)
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

log = logging.getLogger(__name__)

FEW_ROWS = (32, 16, 8, 1)  # that are timed on a GPU
TEXT = 21  # tokens of the pass by which whole layers are compared
ROUTED = 64  # rows by which routers are compared


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
        self.few = FEW_ROWS[0]  # rows up to which one launch does for gate and up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        hidden = self.in_one(rows) if len(rows) <= self.few else self.in_two(rows)
        down: torch.Tensor = self.down_proj(hidden)
        return down.view(*x.shape[:-1], down.shape[-1])

    def in_one(self, rows: torch.Tensor) -> torch.Tensor:
        """Gate and up with the activation behind them in one launch."""
        return gate_up_rows(rows, self.gate_up, self.bias, self.act)

    def in_two(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(rows, self.gate_up, self.bias).chunk(2, dim=-1)
        return kernels.gated(gate, up, self.act)

    def time(self) -> None:
        """Find out up to how many rows one launch is quicker than two, on this device."""
        self.few = _quicker_up_to(self.in_one, self.in_two, self.gate_up)


class FusedRouter(nn.Module):
    """Which experts each token takes, and how much of each: (logits, weights [T, k], chosen [T, k])."""

    def __init__(self, own: Any, among_chosen: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias, self.top_k = own.weight, getattr(own, "bias", None), int(own.top_k)
        self._among_chosen, self._dtype = among_chosen, dtype

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight, self.bias)
        chosen, weights = choose_experts(logits, self.top_k, self._among_chosen, self._dtype)
        return logits, weights, chosen


class GroupedExperts(nn.Module):
    """The experts of one layer, computed for the tokens that chose them. Padding, which the attention's step tells,
    chooses none. ``own``: the model's own module, whose parameters these stay."""

    def __init__(self, own: Any, act: int, attention: TableAttention) -> None:
        super().__init__()
        turn = bool(own.is_transposed)
        self.gate_up_proj, self.down_proj = own.gate_up_proj, own.down_proj
        self.gate_up_proj_bias = getattr(own, "gate_up_proj_bias", None)
        self.down_proj_bias = getattr(own, "down_proj_bias", None)
        self._turned, self._act, self._interleaved = turn, act, not own.is_concatenated
        self._limit, self._alpha = float(getattr(own, "limit", 0.0)), float(getattr(own, "alpha", 0.0))
        self._attention = attention

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        gate_up, down = self.gate_up_proj, self.down_proj
        if self._turned:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        step = self._attention.step
        slots = step.slots if step is not None and len(step.slots) == len(hidden_states) else None
        return experts_sum(
            hidden_states, top_k_index, top_k_weights, gate_up, self.gate_up_proj_bias, down, self.down_proj_bias,
            self._act, interleaved=self._interleaved, limit=self._limit, alpha=self._alpha, slots=slots,
        )  # fmt: skip


class MergedLinear(SharedInput):
    """Linear layers of the same input with their weights joined."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        self.weight = torch.cat([part.weight for part in parts])
        self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
        super().__init__(self.weight.shape[1], self.weight.shape[0])

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class MergedSlice(Slice):
    """One of the linear layers; models ask theirs for its weight."""

    def __init__(self, merged: MergedLinear, begin: int, end: int) -> None:
        super().__init__(merged, begin, end)
        self.weight = nn.Parameter(merged.weight[begin:end], requires_grad=False)  # a view


@torch.no_grad()
def fuse(model: Any, attention: TableAttention, report: FuseReport) -> None:
    """Replace what can be in ``model``, whose attention is to be ``attention``'s."""
    device = next(model.parameters()).device
    sample = SeededInput(model.dtype, device)
    _group_experts(model)
    replace(norm_candidates(model, sample, FusedNorm, kernels.WIDEST_NORM), report)
    replace(product_candidates(model, sample), report)
    replace(_mlps(model, sample), report)
    if device.type == "cuda":
        time_products(model)
        for module in model.modules():
            if isinstance(module, FusedMLP):
                module.time()
    replace(_projections(model, sample), report)
    replace(_routers(model, sample), report)
    replace(_experts(model, attention, sample), report)
    _replace_layers(model, report)
    replace(rotary_candidates(model, lambda original: _same_rotary(original, attention, sample)), report)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the weights that were merged


_timed: dict[tuple[Any, ...], int] = {}


def _quicker_up_to(
    one: Callable[[torch.Tensor], torch.Tensor], other: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor
) -> int:
    """The most of FEW_ROWS with which ``one`` is quicker than ``other``; 0: with none. By shape, measured once."""
    key = (tuple(weight.shape), weight.dtype, weight.device)
    if key not in _timed:
        _timed[key] = next((n for n in FEW_ROWS if _milliseconds(one, weight, n) < _milliseconds(other, weight, n)), 0)
    return _timed[key]


def _milliseconds(run: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor, rows: int) -> float:
    """Milliseconds on the device, the least of some."""
    x = torch.zeros(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    run(x)  # compiles
    took = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        run(x)
        end.record()
        end.synchronize()
        took.append(begin.elapsed_time(end))
    return float(min(took))


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


def _mlps(model: nn.Module, sample: SeededInput) -> Iterator[Candidate]:
    for owner, name, child in children_of(model):
        gate, up, both, down = (
            _linear(getattr(child, n, None)) for n in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
        )
        if down is None or (both is None and (gate is None or up is None or not _mergeable([gate, up]))):
            continue
        merged = MergedLinear([gate, up]) if gate is not None and up is not None else both
        assert merged is not None
        if len(merged.weight) != 2 * down.in_features:
            continue
        x = sample(1, 3, merged.weight.shape[1])
        attempts = [(FusedMLP(merged.weight, merged.bias, down, act),) for act in (kernels.SILU, kernels.GELU_TANH)]
        yield Candidate("mlp", owner, (name,), attempts, (x,), (child(x),))


def _projections(model: nn.Module, sample: SeededInput) -> Iterator[Candidate]:
    for module in model.modules():
        parts = [part for n in QKV if (part := _linear(getattr(module, n, None))) is not None]
        if len(parts) < len(QKV) or not _mergeable(parts):
            continue
        merged = MergedLinear(parts)
        slices = tuple(MergedSlice(merged, *ends) for ends in bounds([part.out_features for part in parts]))
        x = sample(1, 3, parts[0].in_features)
        yield Candidate("qkv", module, QKV, [slices], (x,), tuple(part(x) for part in parts), left_as="qkv")


def _routers(model: nn.Module, sample: SeededInput) -> Iterator[Candidate]:
    """Routers that give (logits, weights, chosen) by softmax, over all experts or over those that were chosen."""
    for owner, name, child in children_of(model):
        router: Any = child
        weight, most = getattr(router, "weight", None), getattr(router, "top_k", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or not isinstance(most, int):
            continue
        x = sample(ROUTED, weight.shape[1]) * 0.2  # small: where one expert takes all, both ways give the same
        try:
            theirs = router(x)
            logits, weights, chosen = theirs
        except (TypeError, ValueError, RuntimeError):  # called in another way, or of another kind
            continue
        if weights.shape != (ROUTED, most) or chosen.shape != (ROUTED, most) or len(weight) > MOST_EXPERTS:
            continue
        found: list[tuple[float, FusedRouter]] = []
        for among_chosen in (False, True):
            ours = FusedRouter(router, among_chosen, weights.dtype)
            our_logits, our_weights, our_chosen = ours(x)
            far = float((our_weights.float() - weights.float()).abs().max())
            near = 1e-5 if weights.dtype == torch.float32 else 1e-2
            if far < near and torch.equal(our_chosen, chosen.to(torch.int64)) and agrees(our_logits, logits):
                found.append((far, ours))
        found.sort(key=lambda each: each[0])  # the nearest, should both be near
        yield Candidate("router", owner, (name,), [(ours,) for _, ours in found])


def _group_experts(model: Any) -> None:
    """Experts that stay the model's own: one grouped product of torch's, not a loop over those that were hit."""
    try:
        model.set_experts_implementation("grouped_mm")
    except (AttributeError, ValueError, KeyError, RuntimeError, ImportError) as error:
        log.debug("experts stay as they are: %s", error)


def _experts(model: nn.Module, attention: TableAttention, sample: SeededInput) -> Iterator[Candidate]:
    """Experts as transformers' `use_experts_implementation` has them: weights of three dimensions, and flags."""
    for owner, name, child in children_of(model):
        experts: Any = child
        weights = [getattr(experts, n, None) for n in ("gate_up_proj", "down_proj")]
        if not all(isinstance(w, torch.Tensor) and w.dim() == 3 for w in weights) or not hasattr(
            experts, "_apply_gate"
        ):
            continue
        if not getattr(experts, "has_gate", True) or getattr(experts, "has_post_expert_norm", False):
            yield Candidate("experts", owner, (name,), ())
            continue
        count, size = experts.down_proj.shape[0], experts.down_proj.shape[2 if experts.is_transposed else 1]
        x, most = sample(7, size), min(2, count)
        scores = sample(7, count, dtype=torch.float32).softmax(-1)
        chosen = scores.topk(most, dim=-1)
        inputs = (x, chosen.indices, chosen.values.to(x.dtype))
        attempts = ((GroupedExperts(experts, act, attention),) for act in (SILU, GELU_TANH, CLAMPED))
        yield Candidate("experts", owner, (name,), attempts, inputs, (child(*inputs),))


# ------------------------------------------------------------------ whole layers

PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


def _replace_layers(model: Any, report: FuseReport) -> None:
    """Layers made of the common parts get a forward of ours if it gives what theirs gave in a pass of the model."""
    found = list(_common_layers(model))
    seen: dict[nn.Module, tuple[dict[str, Any], Any]] = {}
    hooks = [layer.register_forward_hook(_note(seen, layer), with_kwargs=True) for layer, _ in found]
    model.set_attn_implementation("eager")
    try:
        ids = torch.arange(TEXT, device=next(model.parameters()).device)[None]
        model(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        replace((_layer_candidate(layer, following, seen.get(layer)) for layer, following in found), report)
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(NAME)


def _common_layers(model: nn.Module) -> Iterator[tuple[nn.Module, FusedNorm | None]]:
    """Layers of the common parts, and the norm that follows each: the next layer's first, or the model's last."""
    for parent in model.modules():
        for stack in (child for child in parent.children() if isinstance(child, nn.ModuleList)):
            norms = [child for child in parent.children() if isinstance(child, FusedNorm)]
            last = norms[0] if len(norms) == 1 else None
            layers = list(stack)
            for layer, following in zip(layers, [*layers[1:], None], strict=True):
                if _is_common(layer):
                    after = last if following is None else getattr(following, "input_layernorm", None)
                    yield layer, after if isinstance(after, FusedNorm) else None


def _layer_candidate(
    layer: nn.Module, following: FusedNorm | None, seen: tuple[dict[str, Any], Any] | None
) -> Candidate:
    if seen is None or not isinstance(seen[1], torch.Tensor):
        return Candidate("layer", layer, ("forward",), (), left_as="layer")
    keywords, output = seen
    attempts = [(_common_forward(layer, following),)]
    return Candidate(
        "layer", layer, ("forward",), attempts, (), (output,), keywords, left_as="layer", errors=(Exception,)
    )


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


# ------------------------------------------------------------------ rotary


def _same_rotary(
    original: Callable[..., Any], attention: TableAttention, sample: SeededInput
) -> Callable[..., Any] | None:
    """``attention``'s rotary if the kernel rotates as ``original`` does."""
    q, k = sample(1, 4, 5, 16), sample(1, 2, 5, 16)
    angles = sample(1, 5, 8, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    keys, values = (torch.zeros(8, 2, 16, dtype=q.dtype, device=q.device) for _ in range(2))
    slots = torch.arange(5, device=q.device)
    try:
        theirs_q, theirs_k = original(q, k, cos, sin)
    except (TypeError, RuntimeError, IndexError, ValueError):  # another signature or shape: not the one we know
        return None
    query, key = q[0].transpose(0, 1), k[0].transpose(0, 1)
    rotated = kernels.rotate_and_store_kv(key, key, keys, values, slots, query, cos[0], sin[0])
    same = agrees(rotated, theirs_q[0].transpose(0, 1)) and agrees(keys[:5], theirs_k[0].transpose(0, 1))
    return attention.rotary(original) if same else None
