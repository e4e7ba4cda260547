"""PagedAttention on a GPU: the step is tables in device memory; rotary and the write of keys and values are one kernel,
or in a step of decodes part of the attention's.

A model's attention calls `apply_rotary_pos_emb` and then, with the very tensors that it returned, the attention
function. So rotary can be deferred: its replacement returns its arguments as they are and notes the angles, and
the attention function rotates queries and keys where it reads them anyway. Where the attention function is given
other tensors than those, the probe notices, and rotary is computed at once, as the model wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from protocol.errors import EngineFailed
from workers.torch_engine.attention import AttentionRule, PagedAttention
from workers.torch_engine.cuda.step_tables import StepTables
from workers.torch_engine.cuda.triton_attention import Fresh, TritonAttention
from workers.torch_engine.cuda.triton_kernels import rotate_and_store_kv, store_kv


@dataclass
class Rotation:
    """Queries and keys [1, heads, T, size] that are to be rotated by the tables ``cos`` and ``sin`` [1, T, size]."""

    query: torch.Tensor
    key: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class TableAttention(PagedAttention[StepTables]):
    """Attention over the tables of a step, by the Triton kernels."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.kernels = TritonAttention(device)
        self._deferred: Rotation | None = None
        self._defers = True  # until the probe finds an attention that does not hand on what it rotated

    def begin(self, step: StepTables | None, layer: int = 0) -> None:
        super().begin(step, layer)
        self._deferred = None

    def rotary(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What takes the place of ``original``, an `apply_rotary_pos_emb`."""

        def apply_rotary(q, k, cos, sin, *args, **kwargs):  # type: ignore[no-untyped-def]
            plain = not args and not kwargs and q.shape[0] == cos.shape[0] == 1 and cos.dim() == 3
            plain = plain and q.shape[-1] == k.shape[-1] == cos.shape[-1] and cos.stride() == sin.stride()
            if not plain or not (self._probing or self.step is not None) or not self._defers:
                return original(q, k, cos, sin, *args, **kwargs)
            if self._probing:
                q, k = original(q, k, cos, sin)
            self._deferred = Rotation(q, k, cos, sin)
            return q, k

        return apply_rotary

    @property
    def _probing(self) -> bool:
        return self.pool is None

    def call(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rule: AttentionRule,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        deferred = self._deferred
        if deferred is not None and (deferred.query is not query or deferred.key is not key):
            if not self._probing:
                raise EngineFailed(f"{type(module).__name__} changes its queries after they were rotated")
            self._defers = False
        out = super().call(module, query, key, value, rule, sinks)
        self._deferred = None
        return out

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        step: StepTables,
        rule: AttentionRule,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        q, k, v, deferred = _adjacent(query), _adjacent(key), _adjacent(value), self._deferred
        cos, sin = (None, None) if deferred is None else (_adjacent(deferred.cos[0]), _adjacent(deferred.sin[0]))
        if step.single:
            fresh = Fresh(k, v, cos, sin)
            return self.kernels.attend(q, keys, values, step.work, step.block_size, rule, sinks, fresh)
        if cos is not None and sin is not None:
            q = rotate_and_store_kv(k, v, keys, values, step.slots, q, cos, sin)
        else:
            store_kv(k, v, keys, values, step.slots)
        return self.kernels.attend(q, keys, values, step.work, step.block_size, rule, sinks)


def _adjacent(states: torch.Tensor) -> torch.Tensor:
    return states if states.stride(-1) == 1 else states.contiguous()
