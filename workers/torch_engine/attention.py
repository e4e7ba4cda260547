"""Paged attention as an attention function of transformers: one registered name for every model.

transformers calls ``headrace_paged`` once per layer with that layer's queries, keys and values for the flat
batch. The function finds the engine's PagedAttention on the module itself (``adopt`` put it there: some
models do not hand keyword arguments down to their layers), which writes keys and values to the pool by slot
and reads them back by block table. No mask function is registered under the name, so transformers builds no
mask (masking_utils, early exit); the rules that a mask would carry, causality and the sliding window, are
those of the PagedAttention.

PagedAttention is the base; its implementations are TorchAttention (plain/attention.py, any device),
NativeAttention (cpu/attention.py) and TableAttention (cuda/attention.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch
from transformers import AttentionInterface

from protocol.errors import EngineFailed, ModelRefused
from workers.torch_engine.kv_pool import KVPool, LayerShape

NAME = "headrace_paged"

Step = TypeVar("Step")  # how an implementation is told of a step: inputs.StepInputs, or tables on the device


@dataclass(frozen=True)
class AttentionRule:
    """How one layer scores its keys."""

    scale: float
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)


class PagedAttention(ABC, Generic[Step]):
    """One engine's attention: knows the current step, the pool, and which of its layers is called.

    A layer of the pool is the n-th call of a pass: a module that attends twice (diffllama) has two. Until a pool
    is given, calls are those of the probe (verify.py), which only notes their shapes. ``calls`` is never reset: it
    is the engine's heartbeat.
    """

    panel = 1  # a block's slots are rounded up to a multiple of this: keys and values may lie in panels of tokens

    def __init__(self) -> None:
        self.step: Step | None = None
        self.pool: KVPool | None = None
        self.shapes: list[LayerShape] = []
        self.groups: list[int] = []  # query heads per key head of each layer
        self.modules: set[torch.nn.Module] = set()
        self.dtype = torch.float32  # of keys and values, as the probe found them
        self.calls = 0
        self.layer = 0  # of the next call
        self.watch: Callable[[AttentionRule, torch.Tensor | None, int], None] | None = None  # told rule, sinks, heads

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied module calls the same attention

    def begin(self, step: Step | None, layer: int = 0) -> None:
        """A pass over ``step`` begins, at ``layer``."""
        self.step = step
        self.layer = layer

    def next_layers(self, count: int = 1) -> int:
        """Take ``count`` layers of the pool for the call that now begins; the index of the first."""
        self.calls += count
        self.layer += count
        return self.layer - count

    def end(self) -> None:
        """The pass is over. EngineFailed if it called another number of layers than the probe did."""
        self.step = None
        if self.layer != len(self.shapes):
            raise EngineFailed(f"a pass called {self.layer} attention layers instead of {len(self.shapes)}")

    def call(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: AttentionRule,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Arguments and result as transformers has them: [1, heads, T, size] in, [1, T, heads, value_size] out."""
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        if self.pool is None:
            return self._note(module, query, key, value)
        assert self.step is not None
        layer = self.next_layers()
        if self.watch:
            self.watch(rule, sinks, query.shape[1])
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        return self.attend(query, key, value, keys, values, self.step, rule, sinks)[None]

    def _note(
        self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Remember the layer's shape; zeros in place of its result."""
        self.modules.add(module)
        self.calls += 1
        self.shapes.append(LayerShape(key.shape[1], key.shape[2], value.shape[2]))
        self.groups.append(query.shape[1] // key.shape[1])
        self.dtype = key.dtype
        return query.new_zeros(1, query.shape[0], query.shape[1], value.shape[2])

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,  # [T, heads, key_size]
        key: torch.Tensor,  # [T, kv_heads, key_size]
        value: torch.Tensor,  # [T, kv_heads, value_size]
        keys: torch.Tensor,  # one layer of the pool: [slots, kv_heads, key_size]
        values: torch.Tensor,  # [slots, kv_heads, value_size]
        step: Step,
        rule: AttentionRule,
        sinks: torch.Tensor | None,  # [heads]: a further score per head that takes weight but gives no value
    ) -> torch.Tensor:  # [T, heads, value_size]
        """Write ``key`` and ``value`` at the step's slots, then attend to all that the pool holds of the rows."""


def adopt(model: torch.nn.Module, attention: PagedAttention[Any]) -> None:
    """Let every attention call of ``model`` find ``attention``."""
    for module in model.modules():
        module.__dict__["headrace"] = attention


def window_of(module: torch.nn.Module) -> int | None:
    """The sliding window of a layer whose call does not name one: the module's own, else by config.layer_types.

    qwen2_moe and phimoe never pass it. A module that has the attribute speaks for itself, also with None.
    """
    if hasattr(module, "sliding_window"):
        return module.sliding_window or None  # type: ignore[return-value]
    config = getattr(module, "config", None)
    index = getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None and index is not None:
        return window if kinds[index] == "sliding_attention" else None
    return None


def headrace_paged(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function that transformers calls, once per layer. Weights are never returned."""
    attention = module.__dict__["headrace"]
    if attention.pool is None:
        refuse_foreign_masks(module, attention_mask, kwargs)
    rule = AttentionRule(
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        window=kwargs["sliding_window"] if "sliding_window" in kwargs else window_of(module),
        softcap=softcap,
    )
    return attention.call(module, query, key, value, rule, s_aux), None


def refuse_foreign_masks(module: torch.nn.Module, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """Raise ModelRefused where a layer scores by more than causality and a window."""
    kind = type(module).__name__
    if attention_mask is not None:
        raise ModelRefused(f"{kind} passes a mask or bias of its own to its attention")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise ModelRefused(f"{kind} attends to later tokens too")
    unknown = [name for name, given in kwargs.items() if isinstance(given, torch.Tensor) and name not in _IGNORED]
    if unknown:
        raise ModelRefused(f"{kind} passes {', '.join(unknown)} to its attention, which is not served")


_IGNORED = {"position_ids", "cache_position", "input_ids", "position_embeddings"}

AttentionInterface.register(NAME, headrace_paged)
